"""Stable Diffusion 1.x and 2.x in one safetensors file, as CompVis and A1111 lay it out.

Read as the parts of a diffusers folder: names are translated, values stay on disk.
"""

import logging
import re
from pathlib import Path

from jaxgen.types import UserError
from jaxgen.weights.files import Tensors
from jaxgen.weights.single_config import text_config, unet_config, vae_config
from jaxgen.weights.single_names import clip_names, open_clip_names, unet_names, vae_names
from jaxgen.weights.single_scheduler import Config, predicted, scheduler_config

log = logging.getLogger(__name__)

PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.",
}
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")

# What training left behind and sampling recomputes. Of moving average and plain weights the plain
# ones are taken, as every reader of these files does.
_NOISE = re.compile(
    r"model_ema\..+|betas|\w*alphas_cumprod\w*|posterior_\w+|lvlb_weights|logvar|global_step"
    r"|first_stage_model\.(loss|model_ema)\..+"
    r"|cond_stage_model\.(.+\.)?(position_ids|attn_mask|logit_scale|text_projection(\.weight)?)"
)

# No Stable Diffusion 1.x or 2.x file has a key that starts so. The first that fits is told.
_FOREIGN = {
    r"conditioner\.embedders\.": "Stable Diffusion XL",
    r"(model\.diffusion_model\.)?(joint|double)_blocks\.": "Stable Diffusion 3 or Flux",
    r"depth_model\.": "the depth variant of Stable Diffusion 2",
    r"control_model\.|controlnet_cond_embedding\.": "a ControlNet",
    r"lora_(unet|te\d?)_|.+\.lora(_A|_B|_up|_down|\.up|\.down)\b": "a LoRA",
    r"emb_params$|string_to_param": "a textual inversion",
    r"(unet\.)?down_blocks\.|encoder\.down|text_model\.": "one part of a model",
}


def split(tensors: Tensors, where: str) -> dict[str, Tensors]:
    """The parts of a model, under the names they have in a diffusers folder.

    Args:
        tensors: an opened single file.
        where: what to call it in an error.

    Returns:
        `unet`, `vae` and `text_encoder` (with the prefix `text_model.`). A key without a rule is
        left in its part, for the loader to name; one that belongs to no part is logged.

    Raises:
        UserError: when the file is not Stable Diffusion 1.x or 2.x, or says a thing twice.
    """
    parts = _parts(tensors, where)
    known = tuple(PREFIXES.values())
    extra = [k for k in tensors if not (k.startswith(known) or _NOISE.fullmatch(k))]
    if extra:
        log.warning("%s: ignored %d unknown tensors: %s", where, len(extra), ", ".join(extra))
    return parts


def configs(
    tensors: Tensors, path: Path | None = None, prediction_type: str | None = None
) -> dict[str, Config]:
    """The config files of the folder that this file would be, read off its names and shapes.

    What shapes cannot say is what the released models have: 8 heads in the UNet of 1.x, heads of
    64 channels in that of 2.x and in the text encoders, GroupNorms of 32 groups.

    Args:
        tensors: an opened single file.
        path: where it lies. A1111 looks for the model's own YAML beside it, under the same name;
            that tells v-prediction from epsilon.
        prediction_type: `epsilon`, `v_prediction` or `sample`, for a file that came without its
            YAML. Otherwise 1.x and inpainting models are assumed to predict epsilon, 2.x v.

    Returns:
        `unet`, `vae`, `text_encoder` and `scheduler`.
    """
    where = str(path or "the single file")
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise UserError(f"prediction_type {prediction_type!r} is none of {PREDICTION_TYPES}")
    parts = _parts(tensors, where)
    second = _is_second(tensors)
    try:
        unet = unet_config(parts["unet"], second)
        vae = vae_config(parts["vae"])
        text_encoder = text_config(parts["text_encoder"], second)
    except UserError as error:
        raise UserError(f"{where} {error}") from None

    predicts_v = second and unet["in_channels"] == 4
    prediction_type = prediction_type or predicted(path, predicts_v, where)
    large = second and prediction_type == "v_prediction"  # Stable Diffusion 2.1 at 768 pixels
    unet |= {"sample_size": 96 if large else 64, "upcast_attention": large}
    vae["sample_size"] = unet["sample_size"] * 2 ** (len(vae["block_out_channels"]) - 1)
    scheduler = scheduler_config(prediction_type)
    return {"unet": unet, "vae": vae, "text_encoder": text_encoder, "scheduler": scheduler}


def _is_second(tensors: Tensors) -> bool:
    """Stable Diffusion 2.x: its text encoder is OpenCLIP's, under OpenCLIP's names."""
    return any(key.startswith("cond_stage_model.model.") for key in tensors)


def _parts(tensors: Tensors, where: str) -> dict[str, Tensors]:
    text = open_clip_names if _is_second(tensors) else clip_names
    translate = {"unet": unet_names, "vae": vae_names, "text_encoder": text}
    kept = {key: tensor for key, tensor in tensors.items() if not _NOISE.fullmatch(key)}
    for pattern, what in _FOREIGN.items():
        if any(re.match(pattern, key) for key in kept):
            raise UserError(
                f"{where} looks like {what}, not a whole model of Stable Diffusion 1.x or 2.x"
            )
    parts: dict[str, Tensors] = {}
    for name, prefix in PREFIXES.items():
        part = {k.removeprefix(prefix): t for k, t in kept.items() if k.startswith(prefix)}
        if not part:
            raise UserError(
                f"{where} has no {name} ({prefix}*); is it Stable Diffusion 1.x or 2.x, and whole?"
            )
        parts[name] = {}
        for key, tensor in translate[name](part):
            if key in parts[name]:
                raise UserError(f"{where} holds {name} {key} twice, under two names")
            parts[name][key] = tensor
    return parts

"""Stable Diffusion 1.x and 2.x in one safetensors file, as CompVis and A1111 lay it out.

Read as the parts of a diffusers folder: names are translated, values stay on disk. The file numbers
the blocks of a network in one row where diffusers counts levels and layers, hence the arithmetic;
how many there are is read off the names, so that models of any size pass.
"""

import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jaxgen.types import UserError
from jaxgen.weights.files import Tensor, Tensors
from jaxgen.weights.single_scheduler import predicted, scheduler_config

log = logging.getLogger(__name__)

Config = dict[str, Any]
Rules = list[tuple[str, str]]  # (regular expression, replacement), applied one after the other

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

_UNET: Rules = [
    (r"^time_embed\.0\.", "time_embedding.linear_1."),
    (r"^time_embed\.2\.", "time_embedding.linear_2."),
    (r"^input_blocks\.0\.0\.", "conv_in."),
    (r"^(down_blocks\.\d+)\.resnets\.\d+\.op\.", r"\1.downsamplers.0.conv."),
    (r"^(up_blocks\.\d+)\.\w+\.\d+\.conv\.", r"\1.upsamplers.0.conv."),
    (r"^middle_block\.0\.", "mid_block.resnets.0."),
    (r"^middle_block\.1\.", "mid_block.attentions.0."),
    (r"^middle_block\.2\.", "mid_block.resnets.1."),
    (r"^out\.0\.", "conv_norm_out."),
    (r"^out\.2\.", "conv_out."),
    (r"\.in_layers\.0\.", ".norm1."),
    (r"\.in_layers\.2\.", ".conv1."),
    (r"\.emb_layers\.1\.", ".time_emb_proj."),
    (r"\.out_layers\.0\.", ".norm2."),
    (r"\.out_layers\.3\.", ".conv2."),
    (r"\.skip_connection\.", ".conv_shortcut."),
]

_VAE: Rules = [
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"(_blocks\.\d+)\.block\.", r"\1.resnets."),
    (r"(_blocks\.\d+)\.(down|up)sample\.", r"\1.\2samplers.0."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.mid\.attn_1\.", ".mid_block.attentions.0."),
    (r"(\.attentions\.0)\.norm\.", r"\1.group_norm."),
    (r"(\.attentions\.0)\.([qkv])\.", r"\1.to_\2."),
    (r"(\.attentions\.0)\.proj_out\.", r"\1.to_out.0."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"coder\.norm_out\.", "coder.conv_norm_out."),
]

_OPEN_CLIP: Rules = [
    (r"^model\.positional_embedding$", "text_model.embeddings.position_embedding.weight"),
    (r"^model\.token_embedding\.", "text_model.embeddings.token_embedding."),
    (r"^model\.ln_final\.", "text_model.final_layer_norm."),
    (r"^model\.transformer\.resblocks\.", "text_model.encoder.layers."),
    (r"\.ln_([12])\.", r".layer_norm\1."),
    (r"\.attn\.", ".self_attn."),
    (r"\.c_fc\.", ".fc1."),
    (r"\.c_proj\.", ".fc2."),
]


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
        log.warning("%s: ignored %d unknown tensors: %s", where, len(extra), ", ".join(extra[:8]))
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
        unet = _unet_config(parts["unet"], second)
        vae = _vae_config(parts["vae"])
        text_encoder = _text_config(parts["text_encoder"], second)
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
    text = _open_clip if _is_second(tensors) else _clip
    translate = {"unet": unet_names, "vae": _vae, "text_encoder": text}
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


def _rename(key: str, rules: Rules) -> str:
    for pattern, replacement in rules:
        key = re.sub(pattern, replacement, key)
    return key


def _indices(part: Tensors, start: str) -> set[int]:
    """The numbers that stand at the # in the keys that start so."""
    pattern = re.compile(re.escape(start).replace(r"\#", r"(\d{1,3})"))
    return {int(match[1]) for key in part if (match := pattern.match(key))}


def unet_names(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    """A UNet's tensors, or those of its first half, under diffusers' names."""
    # A level is a stretch of the row: its layers, then its downsampler, which the last level lacks.
    samplers = _indices(part, "input_blocks.#.0.op.") - {0}
    blocks = _indices(part, "input_blocks.#.")
    stretch = min(samplers, default=max(blocks, default=0) + 1)
    sides = {"in": "down_blocks", "out": "up_blocks"}
    slots = {"0": "resnets", "1": "attentions", "2": "upsamplers"}

    def place(match: re.Match[str]) -> str:
        # The way down opens with conv_in; on the way up a layer stands in the downsampler's stead.
        level, j = divmod(int(match[2]) - (match[1] == "in"), stretch)
        return f"{sides[match[1]]}.{level}.{slots[match[3]]}.{j}."

    numbered = r"^(?!input_blocks\.0\.)(in|out)put_blocks\.(\d{1,3})\.([012])\."
    for key, tensor in part.items():
        yield _rename(re.sub(numbered, place, key), _UNET), tensor


def _vae(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    levels = len(_indices(part, "decoder.up.#."))

    def reverse(match: re.Match[str]) -> str:  # the file numbers by resolution, diffusers by order
        return f"decoder.up_blocks.{levels - 1 - int(match[1])}."

    for key, tensor in part.items():
        key = _rename(re.sub(r"^decoder\.up\.(\d{1,3})\.", reverse, key), _VAE)
        if ".attentions." in key and tensor.shape[2:] == (1, 1):
            tensor = tensor.squeezed()
        yield key, tensor


def _clip(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    for key, tensor in part.items():  # files of transformers' early days lack `text_model.`
        yield re.sub(r"^transformer\.(text_model\.)?", "text_model.", key), tensor


def _open_clip(part: Tensors) -> Iterator[tuple[str, Tensor]]:
    # The condition is what enters the last block, so diffusers keeps 23 of the 24 of ViT-H. A file
    # that was written from a diffusers folder holds those 23, all of them needed.
    blocks = _indices(part, "model.transformer.resblocks.#.")
    unused = max(blocks, default=0) if len(blocks) != 23 else 23

    for key, tensor in part.items():
        if key.startswith(f"model.transformer.resblocks.{unused}."):
            continue
        key = _rename(key, _OPEN_CLIP)
        fused = re.fullmatch(r"(.+\.self_attn)\.in_proj_(weight|bias)", key)
        if fused and tensor.shape:
            width = tensor.shape[0] // 3
            for i, name in enumerate("qkv"):
                rows = tensor.rows(i * width, (i + 1) * width)
                yield f"{fused[1]}.{name}_proj.{fused[2]}", rows
        else:
            yield key, tensor


def _shape(part: Tensors, key: str, ndim: int) -> tuple[int, ...]:
    if key not in part or len(part[key].shape) < ndim:
        raise UserError(f"has no {key} of {ndim} axes or more; was it cut or changed?")
    return part[key].shape


def _widths(part: Tensors, side: str) -> list[int]:
    """Channels of each level, noted where its first residual block ends."""
    levels = len(_indices(part, f"{side}.#.resnets."))
    return [_shape(part, f"{side}.{i}.resnets.0.conv2.weight", 4)[0] for i in range(max(1, levels))]


def _unet_config(part: Tensors, second: bool) -> Config:
    found = encoder_config(part, second)
    kinds = {"CrossAttnDownBlock2D": "CrossAttnUpBlock2D", "DownBlock2D": "UpBlock2D"}
    return found | {
        "_class_name": "UNet2DConditionModel",
        "out_channels": _shape(part, "conv_out.weight", 4)[0],
        "up_block_types": [kinds[kind] for kind in reversed(found["down_block_types"])],
    }


def encoder_config(part: Tensors, second: bool | None = None) -> Config:
    """What the first half of a UNet says of itself, under diffusers' names.

    Args:
        second: whether it is of Stable Diffusion 2.x; by default, as its projections say.
    """
    attending = _indices(part, "down_blocks.#.attentions.")
    first = f"down_blocks.{min(attending, default=0)}.attentions.0"
    widths = _widths(part, "down_blocks")
    attends = [i in attending for i in range(len(widths))]
    linear = len(_shape(part, f"{first}.proj_in.weight", 2)) == 2
    second = linear if second is None else second
    return {
        "in_channels": _shape(part, "conv_in.weight", 4)[1],
        "down_block_types": ["CrossAttnDownBlock2D" if a else "DownBlock2D" for a in attends],
        "block_out_channels": widths,
        "layers_per_block": len(_indices(part, "down_blocks.0.resnets.#.")),
        "cross_attention_dim": _shape(part, f"{first}.transformer_blocks.0.attn2.to_k.weight", 2)[
            1
        ],
        # diffusers' name for the number of heads
        "attention_head_dim": [max(1, width // 64) for width in widths] if second else 8,
        "use_linear_projection": linear,
    }


def _vae_config(part: Tensors) -> Config:
    widths = _widths(part, "encoder.down_blocks")
    return {
        "_class_name": "AutoencoderKL",
        "in_channels": _shape(part, "encoder.conv_in.weight", 4)[1],
        "out_channels": _shape(part, "decoder.conv_out.weight", 4)[0],
        "latent_channels": _shape(part, "decoder.conv_in.weight", 4)[1],
        "down_block_types": ["DownEncoderBlock2D"] * len(widths),
        "up_block_types": ["UpDecoderBlock2D"] * len(widths),
        "block_out_channels": widths,
        "layers_per_block": len(_indices(part, "encoder.down_blocks.0.resnets.#.")),
        "scaling_factor": 0.18215,
    }


def _text_config(part: Tensors, second: bool) -> Config:
    tokens = _shape(part, "text_model.embeddings.token_embedding.weight", 2)
    positions = _shape(part, "text_model.embeddings.position_embedding.weight", 2)
    return {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "vocab_size": tokens[0],
        "max_position_embeddings": positions[0],
        "hidden_size": tokens[1],
        "intermediate_size": _shape(part, "text_model.encoder.layers.0.mlp.fc1.weight", 2)[0],
        "num_hidden_layers": len(_indices(part, "text_model.encoder.layers.#.")),
        "num_attention_heads": max(1, tokens[1] // 64),
        "hidden_act": "gelu" if second else "quick_gelu",
        "layer_norm_eps": 1e-5,
        "bos_token_id": 49406,
        "eos_token_id": 49407,
    }

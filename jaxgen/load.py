"""Model folders, hub ids and single files in."""

import dataclasses
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen import config, controls, sharding, trees, zoo
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.denoiser import CONTROLLED, Model, control_names
from jaxgen.models.clip import TextEncoder
from jaxgen.models.unet import UNet
from jaxgen.parts import PARTS, checked
from jaxgen.refs import ASSETS, EMBEDDED, find
from jaxgen.types import Params, UserError
from jaxgen.weights import files, single_file
from jaxgen.weights.files import Tensor, Tensors

PREDICTIONS = single_file.PREDICTION_TYPES
DTYPES = {"f32": jnp.float32, "bf16": jnp.bfloat16}
STORED = {**DTYPES, "f16": jnp.float16}  # computing in f16 overflows
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "StableDiffusionInstructPix2PixPipeline",
    "LatentConsistencyModelPipeline",
    "LatentConsistencyModelImg2ImgPipeline",
)
CLIP_TOKENIZER = ASSETS / "clip_tokenizer"


def load(
    ref: str | Path | None = None,
    *,
    dtype: str | None = "f32",
    variant: str = "",
    prediction: str | None = None,
    control: Sequence[str | Path] | str | Path | None = None,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
) -> tuple[Model, Params]:
    """A Stable Diffusion and its parameters, ready to sample.

    Args:
        ref: a folder in the diffusers layout, a hub id, a single safetensors file, or
            `fresh:NAME`, an architecture of the zoo with random parameters; None is the embedded
            model, and so is "mini", where no model folder has that name.
        dtype: "f32" or "bf16", of the parameters and so of the computation; None keeps each
            tensor's own (float64 becomes float32).
        variant: e.g. "fp16", to choose among the files of a folder.
        prediction: "epsilon", "v_prediction" or "sample", where it differs from what the files
            say, or a single file says nothing.
        control: ControlNets, or one, in the stead of those that the folder holds: folders, hub
            ids, single files, or the embedded model's by name (edges, segmentation).
        mesh: devices that hold the parameters; by default the first device alone. `sample` copies
            them to all its devices, unless they are there already.
        rules: (path pattern, PartitionSpec), for parameters that are to be split over the mesh;
            paths begin with the part, as in `unet/conv_in/kernel`.

    Raises:
        UserError: one line that names what is missing, damaged or not supported.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype {dtype!r} is not one of {', '.join(DTYPES)}")
    model, tensors = open_model(ref, variant, prediction, control=control)
    return model, read_params(tensors, dtype, sharding.by_rules(mesh, rules))


def open_model(
    ref: str | Path | None,
    variant: str = "",
    prediction: str | None = None,
    seed: int = 0,
    control: Sequence[str | Path] | str | Path | None = None,
) -> tuple[Model, dict[str, Tensors]]:
    """A model and its tensors by part and path: names and shapes are checked, no values read.

    The seed is that of `fresh:NAME`'s random parameters; `control` is as in `load`, and an empty
    one leaves a folder's own ControlNets aside.
    """
    if prediction not in (None, *PREDICTIONS):
        raise UserError(f"prediction {prediction!r} is not one of {', '.join(PREDICTIONS)}")
    if isinstance(control, str | Path):
        control = [control]
    if str(ref).startswith(zoo.PREFIX):
        model, tensors = _open_fresh(str(ref), seed)
        return controls.attach(_predicting(model, prediction), tensors, control or ())
    path = find(ref, variant)
    if path.is_file():
        model, released = _open_single(path, prediction)
    else:
        model, released = _open_folder(path, variant)
    model = _predicting(model, prediction)
    tensors = _checked(model, released, str(ref or path))
    model = dataclasses.replace(model, name=str(ref or EMBEDDED.name))
    if control is None:
        control = controls.found_in(path) if path.is_dir() else ()
    return controls.attach(model, tensors, control, variant)


def _checked(model: Model, released: Mapping[str, Tensors], where: str) -> dict[str, Tensors]:
    """`parts.checked` of each part; what does not fit, in any of them, is said at once."""
    tensors, wrong = {}, []
    for name in PARTS:
        try:
            tensors[name] = checked(getattr(model, name), released[name], f"{where}: {name}")
        except UserError as error:
            wrong.append(str(error))
    if wrong:
        raise UserError("; ".join(wrong))
    return tensors


def _predicting(model: Model, prediction: str | None) -> Model:
    if not prediction:
        return model
    scheduler = {**model.scheduler, "prediction_type": prediction}
    return dataclasses.replace(model, scheduler=scheduler)


def read_params(
    tensors: Mapping[str, Tensors],
    dtype: str | None = "f32",
    layout: sharding.Layout | None = None,
) -> Params:
    """The tensors of `open_model` as parameters, of a dtype of `STORED`, where a layout says."""
    layout = layout or sharding.by_rules(None)
    kind = STORED[dtype] if dtype else None
    params = {}
    with ThreadPoolExecutor(4) as pool:  # copying and turning axes is most of the time
        for name, part in tensors.items():
            where = [layout(f"{name}/{path}", tensor.shape) for path, tensor in part.items()]
            placed = pool.map(lambda t, w: place(t, kind, w), part.values(), where)
            params[name] = trees.unflatten(dict(zip(part, placed)))
    return params


def place(tensor: Tensor, dtype: Any, where: jax.sharding.Sharding) -> jax.Array:
    """Reads a tensor onto its devices; a host reads only the blocks that its devices hold."""

    def read(index: files.Slices | None) -> np.ndarray:
        assert index is not None
        block = tensor.read(index)
        # JAX may keep what is contiguous as it is, so a copy; anything else it copies itself.
        return block.astype(dtype or tensor.dtype, order="K", copy=block.flags.c_contiguous)

    return jax.make_array_from_callback(tensor.shape, where, read)


def _open_folder(path: Path, variant: str) -> tuple[Model, dict[str, Tensors]]:
    index = path / "model_index.json"
    if not index.is_file():
        parts = [p for p in PARTS if (path / p).is_dir()]
        what = f"only {', '.join(parts)}" if parts else "neither that nor any part of a model"
        raise UserError(
            f"{path} is no model folder: it should hold model_index.json and has {what}"
        )
    pipeline = str(config.read_json(index).get("_class_name"))
    pipeline = {v: k for k, v in CONTROLLED.items()}.get(pipeline, pipeline)
    if pipeline not in PIPELINES:
        raise UserError(
            f"{index} is of {pipeline}; only the Stable Diffusion 1.x and 2.x families are loaded"
            + (" (SDXL's UNet is supported, whole SDXL folders are not yet)" * ("XL" in pipeline))
        )
    networks, tensors = {}, {}
    variants = {p.folder: files.variant_of(path / p.folder, variant) for p in PARTS.values()}
    if variant and not any(variants.values()):
        raise UserError(f"no part of {path} has files of variant {variant}; leave it out")
    for name, part in PARTS.items():
        networks[name], tensors[name] = part.open(path / part.folder, variants[part.folder])
    where = path / "scheduler" / "scheduler_config.json"
    scheduler = config.read_json(where)
    if not isinstance(scheduler.get("_class_name"), str):
        raise UserError(f"{where} does not name its _class_name, e.g. DDIMScheduler")
    tokenizer = Tokenizer.read(path / "tokenizer")
    model = Model(
        **networks, tokenizer=tokenizer, scheduler=scheduler, name=str(path), pipeline=pipeline
    )
    _check(model)
    return model, tensors


def _open_single(path: Path, prediction: str | None) -> tuple[Model, dict[str, Tensors]]:
    whole = files.open_file(path)
    tensors = single_file.split(whole, str(path))
    configs = single_file.configs(whole, path, prediction)
    networks = {name: part.read(configs[name], f"{path}: {name}") for name, part in PARTS.items()}
    scheduler = configs["scheduler"]
    tokenizer = _clip_tokenizer(networks["text_encoder"])  # the file holds none
    pipeline = pipeline_of(networks["unet"])
    model = Model(
        **networks, tokenizer=tokenizer, scheduler=scheduler, name=str(path), pipeline=pipeline
    )
    _check(model)
    return model, tensors


def _open_fresh(ref: str, seed: int) -> tuple[Model, dict[str, Tensors]]:
    """An architecture of the zoo; the embedded model's reads the vocabulary of that."""
    configs = zoo.configs(ref)
    networks = {name: part.read(configs[name], f"{ref}: {name}") for name, part in PARTS.items()}
    small = ref == f"{zoo.PREFIX}{EMBEDDED.name}"
    tokenizer = Tokenizer.read(EMBEDDED / "tokenizer") if small else None
    model = Model(
        **networks,
        tokenizer=tokenizer or _clip_tokenizer(networks["text_encoder"]),
        scheduler=configs["scheduler"],
        name=ref,
    )
    _check(model)
    return model, {name: zoo.fresh(getattr(model, name), name, seed) for name in PARTS}


def _clip_tokenizer(encoder: TextEncoder) -> Tokenizer:
    """CLIP's vocabulary is one, and the families, told by the activation, pad differently."""
    first = encoder.config.hidden_act == "quick_gelu"
    return Tokenizer.read(CLIP_TOKENIZER, pad="<|endoftext|>" if first else "!")


def pipeline_of(unet: UNet) -> str:
    """The diffusers pipeline for a UNet's number of input channels."""
    names = {9: "StableDiffusionInpaintPipeline", 8: "StableDiffusionInstructPix2PixPipeline"}
    return names.get(unet.config.in_channels, "StableDiffusionPipeline")


def _check(model: Model) -> None:
    """The parts must fit each other."""
    width, context = model.text_encoder.config.hidden_size, model.unet.config.cross_attention_dim
    if width != context:
        raise UserError(f"{model.name}: the text encoder is {width} wide, the UNet reads {context}")
    if model.unet.config.addition_embed_type:
        raise UserError(
            f"{model.name}: a UNet with added embeddings (SDXL's) cannot be sampled yet"
        )
    if model.vae.config.latent_channels != model.unet.config.out_channels:
        raise UserError(
            f"{model.name}: the VAE has {model.vae.config.latent_channels} latent channels, "
            f"the UNet predicts {model.unet.config.out_channels}"
        )
    for name in ("in_channels", "out_channels"):
        channels = getattr(model.vae.config, name)
        if channels != 3:
            raise UserError(f"{model.name}: the VAE has {name} = {channels}, and pictures have 3")
    length, positions = model.tokenizer.length, model.text_encoder.config.max_position_embeddings
    if length > positions:
        raise UserError(
            f"{model.name}: the tokenizer fills {length} places, the text encoder has {positions}"
        )
    if model.tokenizer.size > model.text_encoder.config.vocab_size:
        raise UserError(
            f"{model.name}: the tokenizer knows {model.tokenizer.size} tokens, the text encoder "
            f"{model.text_encoder.config.vocab_size}"
        )


def describe(ref: str | Path, variant: str = "") -> str:
    """What a model holds, in lines for people: parts, sizes, prediction type, defaults."""
    model, tensors = open_model(ref, variant)
    unet = model.unet.config
    kinds = {9: "inpainting (9 channels)", 8: "instruction editing (8 channels)"}
    side = unet.sample_size[0] if isinstance(unet.sample_size, tuple) else unet.sample_size
    lines = [f"{ref}: {model.pipeline}"]
    for name in tensors:
        count = sum(int(np.prod(t.shape)) for t in tensors[name].values())
        held = sum(int(np.prod(t.shape)) * t.dtype.itemsize for t in tensors[name].values())
        dtypes = "/".join(sorted({str(t.dtype) for t in tensors[name].values()}))
        lines.append(f"  {name:<13} {count:>13,} parameters  {held / 2**20:>8.1f} MiB  {dtypes}")
    lines += [
        f"  kind          {kinds.get(unet.in_channels, 'text to image')}",
        f"  predicts      {model.scheduler.get('prediction_type', 'epsilon')}",
        f"  scheduler     {model.scheduler.get('_class_name')}",
        f"  size          {f'{side * model.factor} pixels' if side else 'not stated'}, "
        f"f = {model.factor}",
        f"  text          {unet.cross_attention_dim} wide, {model.tokenizer.size} tokens",
        f"  branches      {', '.join(control_names(len(model.controls))) or 'none'}",
    ]
    return "\n".join(lines)

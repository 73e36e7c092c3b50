"""ControlNets, from folders, the hub and single files, attached to a model that they fit."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from jaxgen import config
from jaxgen.denoiser import Model, control_names
from jaxgen.models.controlnet import ControlNet
from jaxgen.parts import CONTROLNET, checked
from jaxgen.refs import CONTROLS, find_control
from jaxgen.types import UserError
from jaxgen.weights import files, single_control
from jaxgen.weights.files import Tensors

MOST = 16  # ControlNets of one model folder

# Fields of a UNet that its ControlNets share, and what an error calls them.
_SHARED = {
    "cross_attention_dim": "text {} wide",
    "block_out_channels": "blocks of {} channels",
    "down_block_types": "blocks {}",
    "addition_embed_type": "addition_embed_type {}",
}


def attach(
    model: Model, tensors: dict[str, Tensors], refs: Sequence[str | Path], variant: str = ""
) -> tuple[Model, dict[str, Tensors]]:
    """The model with further ControlNets, and the tensors of all; names and shapes are checked.

    Args:
        refs: folders, hub ids or single files; `edges` and so on are the embedded model's.

    Raises:
        UserError: for what is missing, damaged, or of another base.
    """
    tensors = dict(tensors)
    for ref in refs:
        net, found = open_control(ref, variant)
        check(model, net, str(ref))
        *_, name = control_names(len(model.controls) + 1)
        model = dataclasses.replace(model, controls=(*model.controls, net))
        tensors[name] = found
    return model, tensors


def open_control(ref: str | Path, variant: str = "") -> tuple[ControlNet, Tensors]:
    """A ControlNet and its tensors by path, of which no values are read."""
    path = find_control(ref, variant)
    if path.is_file():
        data, released = single_control.read(files.open_file(path), str(path))
        net = ControlNet.read(data, str(path))
    else:
        if not (path / "config.json").is_file() and (path / CONTROLNET.folder).is_dir():
            path /= CONTROLNET.folder  # of the whole model that a run ends with
        if not any(path.iterdir()):
            raise UserError(f"{path} is empty; a ControlNet's folder holds config.json and weights")
        net, released = CONTROLNET.open(path, variant)
    return net, checked(net, released, str(path))


def check(model: Model, net: ControlNet, ref: str) -> None:
    """UserError for a ControlNet that was not made for this model's base."""
    ours, theirs = model.unet.config, net.config.encoder
    for name, words in _SHARED.items():
        found, wanted = getattr(theirs, name), getattr(ours, name)
        if found != wanted:
            raise UserError(
                f"{ref} is a ControlNet of another base: it has {words.format(found)}, "
                f"{model.name} has {words.format(wanted)}"
            )
    for name in ("layers_per_block", "transformer_layers_per_block"):
        if theirs.per_level(name) != ours.per_level(name):
            raise UserError(
                f"{ref} is a ControlNet of another base: {name} is {theirs.per_level(name)}, "
                f"{model.name} has {ours.per_level(name)}"
            )
    if theirs.in_channels != model.vae.config.latent_channels:
        raise UserError(
            f"{ref} reads {theirs.in_channels} channels of latents, {model.name} has "
            f"{model.vae.config.latent_channels}"
        )
    if net.config.factor != model.factor:
        raise UserError(
            f"{ref} makes 1/{net.config.factor} of its hint's sides, {model.name} needs "
            f"1/{model.factor}"
        )


def found_in(folder: Path) -> list[Path]:
    """The ControlNets that a model folder holds, in order. UserError if it lacks one it names."""
    there = []
    for name in control_names(MOST):
        if not (folder / name / "config.json").is_file():
            break
        there.append(folder / name)
    if not there and CONTROLNET.folder in config.read_json(folder / "model_index.json"):
        raise UserError(f"{folder} lacks {CONTROLNET.folder}/, which its model_index.json names")
    return there


def is_control(ref: str | Path) -> bool:
    """Whether a folder or file of this machine is a ControlNet, and not a whole model."""
    path = Path(ref)
    try:
        path = path if path.exists() else CONTROLS / path.name
        if path.is_dir():
            data = config.read_json(path / "config.json")
            return data.get("_class_name") == CONTROLNET.class_name
        tensors = files.open_file(path)
        single_control.read(tensors, str(path))
        return not any(key.startswith("first_stage_model.") for key in tensors)
    except (UserError, OSError):
        return False

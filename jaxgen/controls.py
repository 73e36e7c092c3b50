"""ControlNets, from folders, the hub and single files, attached to a model that they fit."""

import dataclasses
import logging
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from jaxgen import config
from jaxgen.data.hints import CHANNELS
from jaxgen.denoiser import Model, control_names
from jaxgen.models.controlnet import ControlNet
from jaxgen.parts import CONTROLNET, PARTS, checked
from jaxgen.refs import control_here, find_control, is_remote
from jaxgen.types import UserError
from jaxgen.weights import files, hub, single_control
from jaxgen.weights.files import Tensors

MOST = 16  # ControlNets of one model folder

logger = logging.getLogger(__name__)

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
        path = _find(ref, variant)
        net, found = _open(path, variant)
        check(model, net, str(ref))
        if _trained_with_another(path, tensors["unet"], variant):
            logger.warning(
                "%s: the UNet beside this ControlNet is not that of %s, and is left out; if they "
                "learned together (unlocked), name the model, too: --model %s",
                *(ref, model.name, path.parent),
            )
        *_, name = control_names(len(model.controls) + 1)
        model = dataclasses.replace(model, controls=(*model.controls, net))
        tensors[name] = found
    return model, tensors


def open_control(ref: str | Path, variant: str = "") -> tuple[ControlNet, Tensors]:
    """A ControlNet and its tensors by path, of which no values are read."""
    return _open(_find(ref, variant), variant)


def _find(ref: str | Path, variant: str) -> Path:
    """The file or the folder of a ControlNet alone."""
    path = find_control(ref, variant)
    whole = not (path / "config.json").is_file() and (path / CONTROLNET.folder).is_dir()
    return path / CONTROLNET.folder if whole else path  # of the whole model that a run ends with


def _open(path: Path, variant: str) -> tuple[ControlNet, Tensors]:
    if path.is_file():
        data, released = single_control.read(files.open_file(path), str(path))
        net = ControlNet.read(data | single_control.told(path), str(path))
    else:
        if not any(path.iterdir()):
            raise UserError(f"{path} is empty; a ControlNet's folder holds config.json and weights")
        net, released = CONTROLNET.open(path, files.variant_of(path, variant))
    return net, checked(net, released, str(path))


def _trained_with_another(path: Path, base: Tensors, variant: str) -> bool:
    """Whether a ControlNet lies in a model whose UNet has another last layer than this base.

    That layer learns in unlocked runs, and its bias is a few numbers.
    """
    if path.is_file():  # which lies anywhere
        return False
    unet = PARTS["unet"]
    try:
        folder = path.parent / unet.folder
        beside = files.open_folder(folder, unet.stem, files.variant_of(folder, variant))
        one, two = beside["conv_out.bias"].numpy(), base["conv_out/bias"].numpy()
        coarse = min(one.dtype, two.dtype, key=lambda kind: kind.itemsize)
        return not np.array_equal(one.astype(coarse), two.astype(coarse))
    except (UserError, KeyError):  # none, or no UNet of ours
        return False


def check(model: Model, net: ControlNet, ref: str) -> None:
    """UserError for a ControlNet of another base than this model's, or that reads no pictures."""
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
    if net.config.conditioning_channels not in CHANNELS:
        raise UserError(
            f"{ref} reads hints of {net.config.conditioning_channels} channels; pictures have "
            f"{' or '.join(map(str, CHANNELS))}"
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
    """Whether a folder, a file or a hub id is of a ControlNet, and not of a whole model."""
    try:
        path = control_here(ref)
        if path is None:
            data = hub.part_config(str(ref)) if is_remote(ref) else {}
            return data.get("_class_name") == CONTROLNET.class_name
        if path.is_dir():
            data = config.read_json(path / "config.json")
            return data.get("_class_name") == CONTROLNET.class_name
        return single_control.holds(files.open_file(path))
    except (UserError, OSError):
        return False

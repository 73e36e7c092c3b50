"""A ControlNet in one safetensors file: as its authors lay it out, or under diffusers' names."""

import logging
import re
from pathlib import Path
from typing import Any

from jaxgen.types import UserError
from jaxgen.weights.files import Tensors
from jaxgen.weights.single_config import encoder_config
from jaxgen.weights.single_names import unet_names
from jaxgen.weights.single_scheduler import yaml_beside

log = logging.getLogger(__name__)

_PREFIX = "control_model."
_DIFFERENCE = "difference"  # a key of files that hold a ControlNet less its base
_HINT = "controlnet_cond_embedding"


def read(tensors: Tensors, where: str) -> tuple[dict[str, Any], Tensors]:
    """The `config.json` of a ControlNet's file, read off its names and shapes, and its tensors.

    What shapes cannot say is what most released ones have: hints in RGB, no pooling (see `told`),
    and heads as `single_file.configs` assumes them.

    Args:
        tensors: an opened file. With the prefix, the file may hold the base model, too.
        where: what to call it in an error.

    Raises:
        UserError: for a file that is none.
    """
    if _DIFFERENCE in tensors:
        raise UserError(f"{where} holds differences from a base, which are to be added to it first")
    inner = {k.removeprefix(_PREFIX): t for k, t in tensors.items() if k.startswith(_PREFIX)}
    part = inner or tensors
    if any(key.startswith("input_hint_block.") for key in part):
        part = dict(_renamed(part))
    elif not any(key.startswith(f"{_HINT}.") for key in part):
        raise UserError(f"{where} is no ControlNet: it holds no encoder of hints")
    try:
        return _config(part), part
    except UserError as error:
        raise UserError(f"{where} {error}") from None


def holds(tensors: Tensors) -> bool:
    """Whether these are of a ControlNet: alone, beside its base, or as differences from one."""
    keys = (_PREFIX, "input_hint_block.", f"{_HINT}.")
    return _DIFFERENCE in tensors or any(key.startswith(keys) for key in tensors)


def told(path: Path) -> dict[str, Any]:
    """Settings that the YAML beside a file states; a warning where its name tells of others.

    Two released ones differ from the rest: 1.0's for normals reads blue, green, red, which no file
    says, and 1.1's for shuffled pictures pools what it adds, which its YAML says.
    """
    text, name = yaml_beside(path), path.stem.lower()
    if "normal" in name and "normalbae" not in name:  # BAE's are of 1.1, and in RGB
        order = 'controlnet_conditioning_channel_order "bgr"'
        _doubt(path, "reads hints as blue, green, red", order)
    if text is None and "shuffle" in name:
        _doubt(path, "pools what it adds", "global_pool_conditions true")
    pools = re.search(r"(?mi)^\s*global_average_pooling\s*:\s*true\s*(#|$)", text or "")
    return {"global_pool_conditions": True} if pools else {}


def _doubt(path: Path, what: str, setting: str) -> None:
    log.warning(
        "%s does not tell whether it %s, as the released one of that name does; if so, make a "
        "folder of it (jaxgen convert) and state %s in its config.json",
        *(path, what, setting),
    )


def _renamed(part: Tensors) -> Tensors:
    """Authors' names into diffusers'."""
    last = max(int(m[1]) for k in part if (m := re.match(r"input_hint_block\.(\d+)\.", k)))

    def place(match: re.Match[str]) -> str:  # an activation stands after each convolution
        i = int(match[1])
        name = "conv_in" if i == 0 else "conv_out" if i == last else f"blocks.{i // 2 - 1}"
        return f"{_HINT}.{name}."

    out: Tensors = {}
    for key, tensor in unet_names(part):
        key = re.sub(r"^input_hint_block\.(\d+)\.", place, key)
        key = re.sub(r"^zero_convs\.(\d+)\.0\.", r"controlnet_down_blocks.\1.", key)
        out[re.sub(r"^middle_block_out\.0\.", "controlnet_mid_block.", key)] = tensor
    return out


def _config(part: Tensors) -> dict[str, Any]:
    blocks = [k for k in part if re.fullmatch(rf"{_HINT}\.blocks\.\d+\.weight", k)]
    blocks = [f"{_HINT}.blocks.{i}.weight" for i in range(1, len(blocks), 2)]  # those that halve
    first, widths = f"{_HINT}.conv_in.weight", [*blocks]
    absent = [key for key in (first, *widths) if key not in part]
    if absent:
        raise UserError(f"has no {absent[0]}; was it cut or changed?")
    return encoder_config(part) | {
        "_class_name": "ControlNetModel",
        "conditioning_channels": part[first].shape[1],
        "conditioning_embedding_out_channels": [part[k].shape[0] for k in (first, *widths)],
    }

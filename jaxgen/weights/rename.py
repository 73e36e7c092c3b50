"""Released key <-> parameter path: one rule and a transpose.

    down_blocks.0.resnets.1.conv1.weight  <->  down_blocks.0/resnets.1/conv1/kernel

A dot before a digit belongs to the name, every other dot parts two names. `weight` is a `kernel`
with its axes in Flax's order, the `embedding` of a table or the `scale` of a norm.
"""

import re
from collections.abc import Mapping

from jaxgen.types import UserError
from jaxgen.weights.files import Tensor, Tensors

# Kernels: PyTorch has (out, in) and (O, I, H, W), Flax (in, out) and (H, W, I, O).
TO_FLAX = {2: (1, 0), 4: (2, 3, 1, 0)}
TO_TORCH = {2: (1, 0), 4: (3, 2, 0, 1)}

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


def to_path(key: str, ndim: int) -> str:
    """The path of a released key whose tensor has `ndim` axes."""
    *names, leaf = re.split(r"\.(?!\d)", key)
    if leaf == "weight":
        if names and names[-1].endswith("_embedding") and ndim == 2:
            leaf = "embedding"
        else:
            leaf = "scale" if ndim == 1 else "kernel"
    return "/".join([*names, leaf])


def to_key(path: str) -> str:
    """The released key of a path."""
    *names, leaf = path.split("/")
    return ".".join([*names, "weight" if leaf in ("kernel", "scale", "embedding") else leaf])


def to_flax(path: str, tensor: Tensor) -> Tensor:
    """A released tensor with its axes in Flax's order."""
    if path.endswith("/kernel"):
        return tensor.transposed(*TO_FLAX[len(tensor.shape)])
    return tensor


def modern_vae(tensors: Tensors) -> Tensors:
    """A VAE whose attention is named as in old files (`query`, `proj_attn`), or has 1x1 kernels."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        new = re.sub(
            r"(mid_block\.attentions\.0\.)(query|key|value|proj_attn)\.",
            lambda m: f"{m[1]}{_OLD_ATTENTION[m[2]]}.",
            key,
        )
        if ".attentions." in new and tensor.shape[2:] == (1, 1):
            tensor = tensor.squeezed()
        _add(out, new, tensor)
    return out


def prefixed_text(tensors: Tensors) -> Tensors:
    """A text encoder's keys with the `text_model.` that transformers 5 leaves out."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        if key.endswith("embeddings.position_ids"):
            continue  # a buffer of old files, 0..76
        if not key.startswith(("text_model.", "text_projection.")):
            key = f"text_model.{key}"
        _add(out, key, tensor)
    return out


def _add(tensors: Tensors, key: str, tensor: Tensor) -> None:
    if key in tensors:
        raise UserError(f"{key} is there twice, under an old name and a new one")
    tensors[key] = tensor


def by_path(tensors: Mapping[str, Tensor]) -> Tensors:
    """Released tensors under their paths, axes in Flax's order."""
    out: Tensors = {}
    for key, tensor in tensors.items():
        path = to_path(key, len(tensor.shape))
        if path.endswith("/kernel") and len(tensor.shape) not in TO_FLAX:
            path = f"{path} ({len(tensor.shape)} axes)"  # fits nothing; the report names it
            out[path] = tensor
        elif to_key(path) != key:  # a name that no released file has
            out[f"{key} (no such name)"] = tensor
        else:
            out[path] = to_flax(path, tensor)
    return out

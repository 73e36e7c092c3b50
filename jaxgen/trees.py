"""Parameter trees as readable paths: `down_blocks.0/resnets.1/conv1/kernel`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from jaxgen.types import Params


def flatten(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested dicts as one dict by path, in the order of the tree."""
    flat: dict[str, Any] = {}
    for name, node in tree.items():
        path = f"{prefix}/{name}" if prefix else name
        if isinstance(node, Mapping):
            flat |= flatten(node, path)
        else:
            flat[path] = node
    return flat


def unflatten(flat: Mapping[str, Any]) -> Params:
    """The inverse of `flatten`."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, name = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = leaf
    return tree


def map_with_path(f: Callable[[str, Any], Any], tree: Mapping[str, Any]) -> Params:
    """`f(path, leaf)` of every leaf."""
    return unflatten({path: f(path, leaf) for path, leaf in flatten(tree).items()})


def split(tree: Mapping[str, Any], chosen: Callable[[str], bool]) -> tuple[Params, Params]:
    """The leaves whose path is chosen, and the others."""
    flat = flatten(tree)
    picked = {path: leaf for path, leaf in flat.items() if chosen(path)}
    return unflatten(picked), unflatten({p: leaf for p, leaf in flat.items() if p not in picked})


def combine(*trees: Mapping[str, Any]) -> Params:
    """Trees of different leaves as one; the inverse of `split`."""
    return unflatten({path: leaf for tree in trees for path, leaf in flatten(tree).items()})


def size(tree: Any) -> int:
    """Number of parameters; leaves may be shapes."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def shapes(init: Callable[[Any], Params]) -> Params:
    """The tree of shapes that `init(key)` would make, without making it."""
    return jax.eval_shape(init, jax.random.key(0))

"""Meshes, and where arrays live on them."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

Rules = Sequence[tuple[str, PartitionSpec]]  # path pattern -> how its axes are split; first match


def data_mesh(count: int | None = None) -> Mesh:
    """The first `count` devices (all of them by default) in a row, axis `data`."""
    devices = np.array(jax.devices()[:count])
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def of_path(path: str, mesh: Mesh | None, rules: Rules = ()) -> Sharding:
    """Where the parameter at `path` lives: as the first rule that fits says, else everywhere."""
    if mesh is None:
        return SingleDeviceSharding(jax.devices()[0])
    for pattern, spec in rules:
        if re.search(pattern, path):
            return NamedSharding(mesh, spec)
    return NamedSharding(mesh, PartitionSpec())


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf whole on every device; free for those that are so already."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree: Any, mesh: Mesh) -> Any:
    """Every leaf split along its first axis, which the mesh's size must divide."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))

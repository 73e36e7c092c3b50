"""Meshes, and where arrays live on them."""

import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import (
    AxisType,
    Mesh,
    NamedSharding,
    PartitionSpec,
    Sharding,
    SingleDeviceSharding,
)

from jaxgen import trees
from jaxgen.types import UserError

Rules = Sequence[tuple[str, PartitionSpec]]  # path pattern -> how its axes are split; first match
Layout = Callable[[str, tuple[int, ...]], Sharding]  # path and shape -> where a parameter lives

AXES = ("data", "fsdp", "tensor")
BATCH = PartitionSpec(("data", "fsdp"))  # examples are spread over both
# Kernels that read what another one, split by its outputs, wrote: split by their inputs.
_READERS = re.compile(r"(to_out\.0|net\.2|out_proj|fc2|proj_out|linear_2)/kernel$")


def data_mesh(count: int | None = None) -> Mesh:
    """The first `count` devices (all of them by default) in a row, axis `data`."""
    devices = np.array(jax.devices()[:count])
    return Mesh(devices, ("data",), axis_types=(AxisType.Auto,))


def local_mesh() -> Mesh:
    """This process' first device alone: for what one process does while others wait."""
    return Mesh(np.array(jax.local_devices()[:1]), ("data",), axis_types=(AxisType.Auto,))


def training_mesh(data: int = -1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Devices by axes: copies of the model, shares of it, shares of each product.

    One size may be -1: whatever is left. A single process may use fewer devices than it has.
    Raises UserError if the sizes do not fit the devices.
    """
    sizes, devices = [data, fsdp, tensor], jax.devices()
    named = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise UserError(f"mesh ({named}): sizes are from 1, and one of them may be -1, the rest")
    if -1 in sizes:
        known = -int(np.prod(sizes))
        sizes[sizes.index(-1)] = 0 if len(devices) % known else len(devices) // known
    count = int(np.prod(sizes))
    if count > len(devices) or count < 1 or (count < len(devices) and jax.process_count() > 1):
        raise UserError(f"mesh ({named}) does not fit {len(devices)} devices")
    return jax.make_mesh(tuple(sizes), AXES, (AxisType.Auto,) * 3, devices=devices[:count])


def layout(mesh: Mesh, rules: Rules = ()) -> Layout:
    """Where each parameter lives in training.

    The first rule whose pattern fits the path decides. Otherwise `tensor` splits the outputs of a
    product, or the inputs of the one after it, and `fsdp` the longest other axis that it divides;
    vectors, and what nothing divides, are whole on every device.
    """

    def where(path: str, shape: tuple[int, ...]) -> NamedSharding:
        for pattern, spec in rules:
            if re.search(pattern, path):
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, _split(path, shape, mesh.shape))

    return where


def _split(path: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> PartitionSpec:
    axes: list[str | None] = [None] * len(shape)
    if len(shape) < 2:
        return PartitionSpec()
    if path.endswith("/kernel"):
        axis = len(shape) - (2 if _READERS.search(path) else 1)
        if sizes["tensor"] > 1 and shape[axis] % sizes["tensor"] == 0:
            axes[axis] = "tensor"
    free = [i for i, n in enumerate(shape) if axes[i] is None and n % sizes["fsdp"] == 0]
    if sizes["fsdp"] > 1 and free:
        axes[max(free, key=lambda i: shape[i])] = "fsdp"
    return PartitionSpec(*axes)


def gather(mesh: Mesh, params: Any) -> Any:
    """Parameters that `fsdp` has split, whole for the products that read them.

    Under `jax.checkpoint` with the policy `gather_again`, a gathered parameter is not kept from
    the forward to the backward pass.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def one(path: str, x: jax.Array) -> jax.Array:
        split = _split(path, x.shape, mesh.shape)
        whole = PartitionSpec(*(axis if axis == "tensor" else None for axis in split))
        return _gathered(x, NamedSharding(mesh, whole), NamedSharding(mesh, split))

    return trees.map_with_path(one, params)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gathered(x: jax.Array, whole: Sharding, split: Sharding) -> jax.Array:
    """x whole; its gradient is split as soon as it is made, and never whole on a device."""
    return jax.lax.with_sharding_constraint(x, whole)


_gathered.defvjp(
    lambda x, whole, split: (jax.lax.with_sharding_constraint(x, whole), None),
    lambda whole, split, _, gradient: (jax.lax.with_sharding_constraint(gradient, split),),
)


def gather_again(primitive: Any, *_: Any, **__: Any) -> bool:
    """Keeps everything from the forward pass but what `gather` and `pin` made."""
    return primitive.name != "sharding_constraint"


def by_rules(mesh: Mesh | None, rules: Rules = ()) -> Layout:
    """As the first rule that fits says, else on every device; on the first one without a mesh."""

    def where(path: str, shape: tuple[int, ...]) -> Sharding:
        if mesh is None:
            return SingleDeviceSharding(jax.devices()[0])
        return NamedSharding(
            mesh, next((spec for p, spec in rules if re.search(p, path)), PartitionSpec())
        )

    return where


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every leaf whole on every device; free for those that are so already."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def split_batch(tree: Any, mesh: Mesh) -> Any:
    """Every leaf split along its first axis, which the mesh's size must divide."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec("data")))


def place_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' rows of a batch -> arrays of the whole batch, spread over the mesh.

    Along `tensor` rows are repeated. Process p brings the p-th part of the batch, as many rows as
    the others.
    """
    where = NamedSharding(mesh, BATCH)
    return {
        name: jax.make_array_from_process_local_data(where, array) for name, array in rows.items()
    }


def pin(x: jax.Array) -> jax.Array:
    """What a block made, [B, ...], held to the split of its batch where a training mesh is in use.

    Without it the compiler may follow the split of the weights, and move activations about.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES:
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH, *rest))


def batch_share(mesh: Mesh) -> tuple[int, int]:
    """(which, of how many): the part of every batch that this process brings.

    Processes that only share `tensor` bring the same part.
    """
    rows = mesh.devices.reshape(-1, mesh.shape["tensor"])
    owners = [{device.process_index for device in row} for row in rows]
    mine = [i for i, owner in enumerate(owners) if jax.process_index() in owner]
    return mine[0] // len(mine), len(rows) // len(mine)


def to_host(tree: Any) -> Any:
    """Every leaf whole, as numpy, on every process; all of them must call it."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)

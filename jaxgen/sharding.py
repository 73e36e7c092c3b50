"""Meshes, and where arrays live on them."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
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
    return Mesh(arrange(sizes, devices[:count]), AXES, axis_types=(AxisType.Auto,) * 3)


def arrange(sizes: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
    """Devices as [data, fsdp, tensor], along the wires: the last axis talks most.

    Slices (parts of a cluster that are wired within; of GPUs, often the nodes) are spread over
    `data` first, which talks least. Raises UserError where the wires do not allow such a mesh.
    """
    slices = len({getattr(device, "slice_index", 0) for device in devices})
    outer, left = [], slices
    for size in sizes:
        outer.append(math.gcd(size, left))
        left //= outer[-1]
    try:
        if slices == 1:
            return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
        inner = [size // ways for size, ways in zip(sizes, outer)]
        return mesh_utils.create_hybrid_device_mesh(
            inner, outer, devices, allow_split_physical_axes=True
        )
    except (ValueError, NotImplementedError, AssertionError) as error:
        named = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes))
        kind = f"{len(devices)} devices ({devices[0].device_kind}, slices: {slices})"
        raise UserError(f"jax finds no mesh ({named}) in {kind}: {error}") from None


def spec(axes: str) -> PartitionSpec:
    """What splits each dimension of a parameter, in words: ". . fsdp tensor".

    A dot leaves a dimension whole, as are those left out; "tensor+fsdp" splits one by both.
    """
    words = axes.split()
    named = [axis for word in words if word != "." for axis in word.split("+")]
    if {*named} - {"fsdp", "tensor"} or len({*named}) < len(named):
        raise UserError(
            f"{axes!r} does not say what splits each dimension, as in '. . fsdp tensor': a dot, "
            "fsdp, tensor or tensor+fsdp for each, and no axis twice"
        )
    parts = [None if word == "." else tuple(word.split("+")) for word in words]
    return PartitionSpec(*(part[0] if part and len(part) == 1 else part for part in parts))


def layout(mesh: Mesh, rules: Rules = ()) -> Layout:
    """Where each parameter lives in training.

    The first rule whose pattern fits the path decides. Otherwise `tensor` splits the outputs of a
    product, or the inputs of the one after it, and `fsdp` the longest other axis that it divides;
    vectors, and what nothing divides, are whole on every device. `where` raises UserError for a
    shape that its rule does not fit.
    """

    def where(path: str, shape: tuple[int, ...]) -> NamedSharding:
        return NamedSharding(mesh, _spec(path, shape, mesh.shape, rules))

    return where


def _spec(
    path: str, shape: tuple[int, ...], sizes: Mapping[str, int], rules: Rules
) -> PartitionSpec:
    for pattern, given in rules:
        if re.search(pattern, path):
            if len(given) > len(shape):
                raise UserError(
                    f"mesh.rules: {pattern!r} splits {len(given)} dimensions, but {path} is "
                    f"{list(shape)}; a pattern that ends in kernel$ leaves vectors out"
                )
            for size, axes in zip(shape, given):
                ways = math.prod(sizes[axis] for axis in _names(axes))
                if size % ways:
                    raise UserError(
                        f"mesh.rules: {pattern!r} splits {size} of {path}, which is {list(shape)}, "
                        f"in {ways} ({'+'.join(_names(axes))}), which does not divide it"
                    )
            return given
    return _split(path, shape, sizes)


def _names(axes: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """What a partition says of one dimension, as the names of axes."""
    return (axes,) if isinstance(axes, str) else axes or ()


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


def gather(mesh: Mesh, params: Any, rules: Rules = ()) -> Any:
    """Parameters that `fsdp` has split, whole for the products that read them.

    Gathered once a step: they stay whole, in the dtype of products, until the backward pass has
    read them.
    """
    if mesh.shape["fsdp"] == 1:
        return params

    def one(path: str, x: jax.Array) -> jax.Array:
        split = _spec(path, x.shape, mesh.shape, rules)
        whole = PartitionSpec(*("tensor" if "tensor" in _names(axes) else None for axes in split))
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


def place_like(tree: Any, other: Any) -> Any:
    """Every leaf where its counterpart lies: what a loop hands round compiles nothing twice."""
    return jax.tree.map(lambda new, old: jax.device_put(new, old.sharding), tree, other)


def place_batch(rows: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This process' rows of a batch -> arrays of the whole batch, spread over the mesh.

    Along `tensor` rows are repeated. They come in the order of `batch_rows`.
    """
    where, parts = NamedSharding(mesh, BATCH), _parts(mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]

    def one(array: np.ndarray) -> jax.Array:
        share = len(array) // len(parts)

        def part(index: Any) -> np.ndarray:
            first = parts.index((index[0].start or 0) // share) * share
            return array[first : first + share]

        return jax.make_array_from_callback((share * ways, *array.shape[1:]), where, part)

    return {name: one(array) for name, array in rows.items()}


def pin(x: jax.Array) -> jax.Array:
    """What a block made, [B, ...], held to the split of its batch where a training mesh is in use.

    Without it the compiler may follow the split of the weights, and move activations about.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.axis_names != AXES:
        return x
    rest = [PartitionSpec.UNCONSTRAINED] * (x.ndim - 1)
    return jax.lax.with_sharding_constraint(x, PartitionSpec(*BATCH, *rest))


def batch_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Which rows of every batch this process brings, ascending.

    They need not be neighbours: a mesh follows the wires between devices, not the processes.
    Processes that only share `tensor` bring the same ones.
    """
    share = batch_size // (mesh.shape["data"] * mesh.shape["fsdp"])
    return [part * share + row for part in _parts(mesh) for row in range(share)]


def _parts(mesh: Mesh) -> list[int]:
    """Which of the parts that a batch is split into lie on devices of this process."""
    owners = mesh.devices.reshape(-1, mesh.shape["tensor"])
    mine = jax.process_index()
    return [i for i, row in enumerate(owners) if any(d.process_index == mine for d in row)]


def to_host(tree: Any) -> Any:
    """Every leaf whole, as numpy, on every process; all of them must call it."""
    if jax.process_count() == 1:
        return jax.tree.map(np.asarray, tree)
    return jax.tree.map(lambda x: multihost_utils.process_allgather(x, tiled=True), tree)

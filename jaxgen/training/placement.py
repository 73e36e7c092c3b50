"""Where a run's arrays live on its mesh: the first state or a restored one, and what is frozen."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen import sharding, trees
from jaxgen.load import DTYPES
from jaxgen.tasks.base import Task
from jaxgen.training import optim
from jaxgen.training import step as steps
from jaxgen.training.recipe import Train
from jaxgen.training.step import State
from jaxgen.types import Params
from jaxgen.weights.files import Tensors


def begin(recipe: Train, task: Task, params: Params, mesh: Mesh) -> tuple[State, Params, Any]:
    """The first state, what is frozen, and the optimizer; every array where it belongs."""
    learned, frozen = _placed(recipe, task, params, mesh)
    like, start, transform = _plan(recipe, learned, mesh)
    where = jax.tree.map(lambda x: x.sharding, like)
    return jax.jit(start, out_shardings=where)(learned), frozen, transform


def resume(
    recipe: Train,
    task: Task,
    initial: Callable[[], Params],
    mesh: Mesh,
    restore: Callable[[State], State],
) -> tuple[State, Params, Any]:
    """As `begin`, but the state is what `restore` makes of its shapes.

    What learned is let go of first: nothing is held twice.
    """
    learned, frozen = _placed(recipe, task, initial(), mesh)
    like, _, transform = _plan(recipe, learned, mesh)
    del learned
    return restore(like), frozen, transform


def _placed(recipe: Train, task: Task, params: Params, mesh: Mesh) -> tuple[Params, Params]:
    """What learns, and what is frozen, in the dtype of products."""
    layout = sharding.layout(mesh, recipe.mesh.specs)
    learns = lambda path: task.learns(path) and not optim.frozen(recipe.optimizer, path)  # noqa: E731
    learned, frozen = trees.split(params, learns)
    place = lambda path, x: jax.device_put(x, layout(path, x.shape))  # noqa: E731
    learned = trees.map_with_path(place, learned)
    dtype = DTYPES[recipe.dtype]
    return learned, trees.map_with_path(lambda path, x: place(path, x.astype(dtype)), frozen)


def _plan(recipe: Train, learned: Params, mesh: Mesh) -> tuple[State, Callable, Any]:
    """The state as shapes with shardings, what makes the first one, and the optimizer."""
    layout = sharding.layout(mesh, recipe.mesh.specs)
    whole = NamedSharding(mesh, PartitionSpec())
    transform = optim.build(recipe.optimizer, learned, recipe.steps)
    start = partial(steps.start, optimizer=transform, average=recipe.ema)
    shapes = jax.eval_shape(start, learned)
    kept = jax.tree.map(lambda x: x.sharding, learned)
    where = State(
        whole,  # type: ignore[arg-type]
        kept,
        optim.shardings(shapes.optimizer, learned, layout, whole),
        kept if recipe.ema else {},
    )
    placed = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)  # noqa: E731
    return jax.tree.map(placed, shapes, where), start, transform


def as_read(
    recipe: Train,
    task: Task,
    tensors: Mapping[str, Tensors],
    learned: Mapping[str, Any],
    params: Params,
) -> Params:
    """The parameters, on the host, with what did not learn as the run read it, in float32.

    The networks had it in the recipe's dtype, which may hold less. `learned` is by path.
    """
    if recipe.dtype == "f32":
        return params
    given = {
        f"{part}/{path}": np.broadcast_to(np.float32(0), tensor.shape)  # which takes no memory
        if f"{part}/{path}" in learned
        else tensor.numpy().astype(np.float32)
        for part, of in tensors.items()
        for path, tensor in of.items()
    }
    with jax.default_device(jax.local_devices(backend="cpu")[0]):  # the others may be full
        first = task.init(jax.random.key(recipe.seed), trees.unflatten(given))
    kept, _ = trees.split(params, learned.__contains__)
    _, untouched = trees.split(first, learned.__contains__)
    return trees.combine(kept, untouched)


def compiled_once(recipe: Train, task: Task, transform: Any, state: State, mesh: Mesh) -> Any:
    """The step as one program, which takes its state's memory for the new one.

    To be called within `jax.set_mesh(mesh)`.
    """
    dtype, rules = DTYPES[recipe.dtype], recipe.mesh.specs
    step = steps.make(
        task, transform, recipe.ema, recipe.seed, dtype, recipe.accumulate, mesh, rules
    )
    where = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(step, donate_argnums=0, out_shardings=(where, None))

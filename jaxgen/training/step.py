"""One pure step of training, for every task."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from jaxgen import sharding, trees
from jaxgen.tasks.base import Batch, Metrics, Task
from jaxgen.training import ema
from jaxgen.training.ema import EMA
from jaxgen.types import Array, Params


class State(NamedTuple):
    """What a step changes, and a checkpoint holds."""

    step: Array  # [] updates done
    learned: Params  # float32
    optimizer: optax.OptState
    averaged: Params  # the average of what is learned over steps; empty without


Step = Callable[[State, Params, Batch], tuple[State, Metrics]]


def start(learned: Params, optimizer: optax.GradientTransformation, average: EMA | None) -> State:
    """The state before the first step."""
    averaged = ema.init(learned) if average else {}
    return State(jnp.zeros((), jnp.int32), learned, optimizer.init(learned), averaged)


def make(
    task: Task,
    optimizer: optax.GradientTransformation,
    average: EMA | None,
    seed: int,
    dtype: jnp.dtype,
    accumulate: int = 1,
    mesh: Mesh | None = None,
    rules: sharding.Rules = (),
) -> Step:
    """The step (state, frozen parameters, batch) -> (state, metrics), to be jitted.

    Gradients and moments exist for what learns alone. The key of step n is a function of the seed
    and n: a run that goes on draws what the uninterrupted one would have drawn.
    """

    def loss(learned: Params, frozen: Params, batch: Batch, key: Array) -> tuple[Array, Metrics]:
        params = trees.combine(cast(learned, dtype), frozen)
        if mesh is not None:
            params = sharding.gather(mesh, params, rules)
        return task.loss(params, batch, key)

    gradient = jax.value_and_grad(loss, has_aux=True)

    def step(state: State, frozen: Params, batch: Batch) -> tuple[State, Metrics]:
        key = jax.random.fold_in(jax.random.key(seed), state.step)
        if accumulate == 1:
            (value, metrics), grads = gradient(state.learned, frozen, batch, key)
        else:
            value, metrics, grads = _in_parts(
                gradient, state.learned, frozen, batch, key, accumulate
            )
        updates, opt_state = optimizer.update(grads, state.optimizer, state.learned)
        learned = optax.apply_updates(state.learned, updates)
        averaged = state.averaged
        if average:
            averaged = ema.update(average, averaged, learned, state.step + 1)
        metrics = metrics | {"loss": value, "grad_norm": optax.tree.norm(grads)}
        return State(state.step + 1, learned, opt_state, averaged), metrics

    return step


def _in_parts(
    gradient: Callable, learned: Params, frozen: Params, batch: Batch, key: Array, parts: int
) -> tuple[Array, Metrics, Params]:
    """Means over parts of a batch, one after the other; every part is spread over all devices."""
    split = jax.tree.map(lambda x: x.reshape(-1, parts, *x.shape[1:]).swapaxes(0, 1), batch)

    def add(total: tuple, part: Batch) -> tuple[tuple, None]:
        (value, metrics), grads = gradient(learned, frozen, part, key)
        return jax.tree.map(lambda a, b: a + b / parts, total, (value, metrics, grads)), None

    first = jax.tree.map(lambda x: x[0], split)
    (value, metrics), grads = jax.eval_shape(gradient, learned, frozen, first, key)
    zeros = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), (value, metrics, grads))
    return jax.lax.scan(add, zeros, split)[0]


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """The tree in the dtype that networks compute in."""
    return jax.tree.map(lambda x: x.astype(dtype), params)

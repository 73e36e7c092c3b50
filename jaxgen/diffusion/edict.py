"""EDICT: two coupled latents, of which each step can be undone exactly (Wallace et al. 2023).

Because it can, a gradient needs no latent of any step: the way back is computed again from the end
(`unroll`), in the memory of one call of the network, however many steps there are.
"""

from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.diffusion.samplers import EDICT_MIX as MIX
from jaxgen.diffusion.samplers import State, edict, predict
from jaxgen.types import Array, Denoiser, Point, at_least_float32


def unroll(denoise: Denoiser, state: State, points: Point, last: int = 1) -> tuple[State, Array]:
    """Every row of the grid; differentiable, in the state alone, in the memory of one call.

    Two calls a step on the way there, two with their gradients on the way back.

    Args:
        denoise: (x, point) -> raw prediction; what it closes over gets no gradient.
        state: x is [B, ...], and the memory one array like it.
        points: each field has a leading axis of rows [S].
        last: steps whose x is wanted, the last ones; at most S.

    Returns:
        The last state, and x after each of the last steps, [last, B, ...].
    """
    length = points.time.shape[0]
    rows = jnp.arange(length) - (length - last)  # from 0 on, x is wanted

    @jax.custom_vjp
    def run(state: State) -> tuple[State, Array]:
        def body(carry: tuple[State, Array], point: Point) -> tuple[tuple[State, Array], None]:
            state = edict(denoise, carry[0], point, None)
            return (state, jnp.concatenate([carry[1][1:], state.x[None]])), None

        xs = jnp.zeros((last, *state.x.shape), state.x.dtype)
        return jax.lax.scan(body, (state, xs), points)[0]

    def forward(state: State) -> tuple[tuple[State, Array], State]:
        found = run(state)
        return found, found[0]

    def backward(after: State, slopes: tuple[State, Array]) -> tuple[State]:
        slope, of_xs = slopes

        def body(both: tuple[State, State], here: tuple[Point, Array]) -> Any:
            point, row = here
            after, slope = both
            more = jnp.where(row >= 0, of_xs[jnp.maximum(row, 0)], 0)
            return _undo(denoise, after, slope._replace(x=slope.x + more), point), None

        (_, slope), _ = jax.lax.scan(body, (after, slope), (points, rows), reverse=True)
        return (slope,)

    run.defvjp(forward, backward)
    return run(jax.tree.map(at_least_float32, state))


def undo(denoise: Denoiser, state: State, point: Point) -> State:
    """The state before a step of `edict`, from the one after it."""
    return _undo(denoise, state, jax.tree.map(jnp.zeros_like, state), point)[0]


def _undo(denoise: Denoiser, after: State, slopes: State, point: Point) -> tuple[State, State]:
    """A step's state before it, and the gradient with respect to that, from those after it."""
    (y, (x,)), (dy, (dx,)) = after, slopes
    _, here, there = point.weights
    y = (y - (1 - MIX) * x) / MIX
    dx = dx + (1 - MIX) * dy
    dy = MIX * dy

    x = (x - (1 - MIX) * y) / MIX
    dy = dy + (1 - MIX) * dx
    dx = MIX * dx

    eps, pull = jax.vjp(lambda x: _eps(denoise, x, point), x)
    y = (y - there * eps) / here
    dx = dx + pull(there * dy)[0]
    dy = here * dy

    eps, pull = jax.vjp(lambda y: _eps(denoise, y, point), y)
    x = (x - there * eps) / here
    dy = dy + pull(there * dx)[0]
    dx = here * dx
    return State(x, (y,)), State(dx, (dy,))


def _eps(denoise: Denoiser, x: Array, point: Point) -> Array:
    return predict(denoise, x, point)[1]

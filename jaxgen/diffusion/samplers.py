"""Samplers: one step each, and the two drivers that own the loop.

A step is a pure function of a denoiser, a state and a point of a grid, whose coefficients
`grids.grid` worked out. Because they are only that, `jit`, `vmap` and `grad` pass through:
`jax.grad(lambda seed: score(unroll(ddim, denoise, State(seed, ()), points, None).x))` improves a
seed.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.types import Array, Denoiser, Point, at_least_float32

EDICT_MIX = 0.93  # p of the paper: each latent's own share where the two are mixed


class State(NamedTuple):
    """What a sampler carries from step to step, in float32 or better."""

    x: Array  # [B, ...] the noisy latents
    memory: tuple[Array, ...]  # each like x; what a multistep sampler remembers


Step = Callable[[Denoiser, State, Point, Array | None], State]
After = Callable[[Array, Point], Array]  # (x after a step, the step's point) -> x


def predict(denoise: Denoiser, x: Array, point: Point) -> tuple[Array, Array]:
    """Noisy x [...] -> the predicted clean latent, within the grid's bound, and eps; both [...].

    Clipping (`clip_sample`) leaves eps as predicted, as in diffusers.
    """
    clean, eps = point.split(x, denoise(x, point).astype(x.dtype))
    bound = point.weights[0]
    return jnp.clip(clean, -bound, bound), eps


def fresh_noise(x: Array, point: Point, keys: Array | None) -> Array | float:
    """The new noise of a step, like x [B, ...], from one key per image [B]; None draws nothing.

    An image's noise depends on its own key and the step alone, not on its place in a batch.
    """
    if keys is None:
        return 0.0

    def draw(key):
        return jax.random.normal(jax.random.fold_in(key, point.index), x.shape[1:], x.dtype)

    return point.fresh * jax.vmap(draw)(keys)


def ddim(denoise: Denoiser, state: State, point: Point, keys: Array | None) -> State:
    """One step of DDIM (Song et al. 2021, eq. 12): x' = signal' * clean + keep * eps + fresh * n.

    It also serves Euler (Karras et al. 2022, algorithm 1) and its ancestral form: with x = clean +
    sigma * eps, the Euler step x + (x - clean) / sigma * (sigma_next - sigma) is clean +
    sigma_next * eps, the same formula on a grid whose signal is 1.
    """
    clean, eps = predict(denoise, state.x, point)
    x = point.signal_next * clean + point.keep * eps
    return State(x + fresh_noise(x, point, keys), ())


def ddpm(denoise: Denoiser, state: State, point: Point, keys: Array | None) -> State:
    """One ancestral step: the posterior q(x_next | x, clean) (Ho et al. 2020, eq. 6 and 7)."""
    _, clean_share, x_share = point.weights
    clean, _ = predict(denoise, state.x, point)
    x = clean_share * clean + x_share * state.x
    return State(x + fresh_noise(x, point, keys), ())


def dpmpp(denoise: Denoiser, state: State, point: Point, keys: Array | None) -> State:
    """One step of DPM-Solver++(2M) (Lu et al. 2022b, algorithm 2); remembers the last clean."""
    _, x_share, clean_share, slope = point.weights
    (before,) = state.memory
    clean, _ = predict(denoise, state.x, point)
    x = x_share * state.x + clean_share * clean + slope * (clean - before)
    return State(x, (clean,))


def pndm(denoise: Denoiser, state: State, point: Point, keys: Array | None) -> State:
    """One call of pseudo linear multistep (Liu et al. 2022, eq. 12).

    Remembers the last x, for the call that repeats the first step (and leaves no history), and
    the last three raw predictions, newest first.
    """
    _, x_share, mix_share, again, *shares = point.weights
    saved, *history = state.memory
    prediction = denoise(state.x, point).astype(state.x.dtype)

    mix = sum(share * p for share, p in zip(shares, [prediction, *history], strict=True))
    x = x_share * jnp.where(again > 0, saved, state.x) + mix_share * mix

    pushed = [prediction, *history[:-1]]
    kept = (jnp.where(again > 0, old, new) for old, new in zip(history, pushed, strict=True))
    return State(x, (state.x, *kept))


def lcm(denoise: Denoiser, state: State, point: Point, keys: Array | None) -> State:
    """One step of a latent consistency model (Luo et al. 2023): denoise, and renoise."""
    _, c_out, c_skip = point.weights
    clean, _ = predict(denoise, state.x, point)
    x = point.signal_next * (c_out * clean + c_skip * state.x)
    return State(x + fresh_noise(x, point, keys), ())


def edict(denoise: Denoiser, state: State, point: Point, keys: Array | None) -> State:
    """One step of EDICT (Wallace et al. 2023, eq. 14), which `diffusion/edict.py` can undo.

    DDIM of two latents, each by the other's eps; remembers the second. They change places at each
    step, so that neither always goes first (their section 4.3).
    """
    _, here, there = point.weights
    x, (y,) = state
    x = here * x + there * predict(denoise, y, point)[1]
    y = here * y + there * predict(denoise, x, point)[1]
    x = EDICT_MIX * x + (1 - EDICT_MIX) * y
    y = EDICT_MIX * y + (1 - EDICT_MIX) * x
    return State(y, (x,))


def _zeros(count: int) -> Callable[[Array], tuple[Array, ...]]:
    return lambda x: tuple(jnp.zeros_like(at_least_float32(x)) for _ in range(count))


class Sampler(NamedTuple):
    """A step and what it needs."""

    step: Step
    memory: Callable[[Array], tuple[Array, ...]]  # x [B, ...] -> the memory of a run's first step
    stochastic: bool  # wants keys whatever the grid; ddim does for eta > 0


SAMPLERS = {
    "ddim": Sampler(ddim, _zeros(0), stochastic=False),
    "ddpm": Sampler(ddpm, _zeros(0), stochastic=True),
    "euler": Sampler(ddim, _zeros(0), stochastic=False),
    "euler_a": Sampler(ddim, _zeros(0), stochastic=True),
    "dpmpp": Sampler(dpmpp, _zeros(1), stochastic=False),
    "pndm": Sampler(pndm, _zeros(4), stochastic=False),
    "lcm": Sampler(lcm, _zeros(0), stochastic=True),
    "edict": Sampler(edict, lambda x: (at_least_float32(x),), stochastic=False),
}


def walk(
    step: Step,
    denoise: Denoiser,
    state: State,
    points: Point,
    start: Array | int,
    stop: Array | int,
    keys: Array | None,
    after: After | None = None,
) -> State:
    """Steps start..stop-1 of a padded grid: one compilation serves every number of steps.

    Args:
        step: of a sampler.
        denoise: (x, point) -> raw prediction.
        state: x is [B, ...].
        points: each field has a leading axis of rows; see `grids.pad`.
        start: first row, traced or not.
        stop: one past the last row: the grid's length, not that of its padding.
        keys: one typed key per image [B], or None for a run without fresh noise.
        after: applied to x after each step.
    """
    points = jax.tree.map(jnp.asarray, points)  # numpy cannot be indexed by a traced row

    def body(i, state):
        return _once(step, denoise, state, jax.tree.map(lambda f: f[i], points), keys, after)

    return jax.lax.fori_loop(start, stop, body, jax.tree.map(at_least_float32, state))


def unroll(
    step: Step,
    denoise: Denoiser,
    state: State,
    points: Point,
    keys: Array | None,
    after: After | None = None,
) -> State:
    """Every row of the grid, differentiable in the memory of one step; arguments as in `walk`."""
    return trail(step, denoise, state, points, keys, after)[0]


def trail(
    step: Step,
    denoise: Denoiser,
    state: State,
    points: Point,
    keys: Array | None,
    after: After | None = None,
) -> tuple[State, Array]:
    """As `unroll`; and x after each row, [S, B, ...]."""

    @jax.checkpoint
    def body(state, point):
        state = _once(step, denoise, state, point, keys, after)
        return state, state.x

    return jax.lax.scan(body, jax.tree.map(at_least_float32, state), points)


def _once(step, denoise, state, point, keys, after) -> State:
    state = step(denoise, state, point, keys)
    if after is None:
        return state
    return state._replace(x=after(state.x, point).astype(state.x.dtype))

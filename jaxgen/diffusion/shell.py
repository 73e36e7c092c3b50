"""The Gaussian shell: how likely the norm of a seed is, and paths and centroids that respect it.

Standard normal noise of d numbers has a norm of about sqrt(d - 1), and a network has seen no other.
Between two seeds a straight line leaves the shell; what is computed here stays on it ("norm-aware
optimisation", Samuel et al. 2023).
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxgen.types import Array

MOST = 10_000  # iterations of a path or a centroid; their published code stops there
RATE = 0.01
CALM = 10  # iterations in a row that change the loss by less than the tolerance: it has settled


def log_prior(norm: Array, size: int) -> Array:
    """Log density of the norm [...] of `size` standard normal numbers, chi-distributed.

    (d - 1) ln r - r^2 / 2 - (d / 2 - 1) ln 2 - ln Gamma(d / 2), as differences from the peak: the
    terms themselves are tens of thousands, and float32 would leave nothing of their sum.
    """
    peak = math.sqrt(size - 1)
    top = (size - 1) * (math.log(peak) - 0.5) - (size / 2 - 1) * math.log(2)
    top -= math.lgamma(size / 2)
    off = (norm - peak) / peak
    return top + (size - 1) * (jnp.log1p(off) - off - off**2 / 2)


def path(first: Array, last: Array, key: Array, count: int = 50) -> Array:
    """The likeliest way from one seed [d] to another: [count, d], both ends included.

    Maximises the sum over steps of length times log prior of the norm in their middle (Samuel et
    al. 2023, eq. 5): since log priors are below 0, short ways through likely norms. Steps longer
    than twice the straight line's cost extra.
    """
    bound = 2 * jnp.linalg.norm(last - first) / count
    noise = jax.random.uniform(key, (count - 2, first.size), first.dtype) / 100
    start = _line(first, last, count)[1:-1] + noise

    def loss(inner: Array) -> Array:
        return _length(jnp.concatenate([first[None], inner, last[None]]), bound)

    inner = _settled(loss, start, tolerance=1e-3, calm=CALM)
    return jnp.concatenate([first[None], inner, last[None]])


def centroid(seeds: Array, key: Array, count: int = 20) -> tuple[Array, Array]:
    """The seed that lies between others [K, d], and the ways from it to each: [d], [K, count, d].

    Minimises the lengths of the ways, as in `path`, and its own log prior's negative, together
    (Samuel et al. 2023, eq. 6).
    """
    size = seeds.shape[-1]
    mean = seeds.mean(0)
    middle = mean * (math.sqrt(size - 1) / jnp.linalg.norm(mean))
    lines = jax.vmap(lambda seed: _line(middle, seed, count))(seeds)
    noise = jax.random.uniform(key, (len(seeds), count - 2, size), seeds.dtype) / 100
    bounds = 2 * jnp.linalg.norm(seeds - middle, axis=-1) / count

    def whole(middle: Array, inner: Array) -> Array:
        first = jnp.broadcast_to(middle, (len(seeds), 1, size))
        return jnp.concatenate([first, inner, seeds[:, None]], 1)

    def loss(held: tuple[Array, Array]) -> Array:
        ways = jax.vmap(_length)(whole(*held), bounds)
        return ways.sum() - log_prior(jnp.linalg.norm(held[0]), size)

    found = _settled(loss, (middle, lines[:, 1:-1] + noise), tolerance=1e-2, calm=CALM // 2)
    return found[0], whole(*found)


def between(first: Array, last: Array, share: Array | float) -> Array:
    """A seed [...] on the great circle between two, both of any norm: the norm goes on evenly."""
    norms = jnp.linalg.norm(first), jnp.linalg.norm(last)
    one, two = first / norms[0], last / norms[1]
    angle = jnp.arccos(jnp.clip(jnp.vdot(one, two), -1, 1))
    sine = jnp.where(angle > 1e-4, jnp.sin(angle), 1)
    weights = jnp.sin((1 - share) * angle) / sine, jnp.sin(share * angle) / sine
    direction = weights[0] * one + weights[1] * two
    direction = jnp.where(angle > 1e-4, direction, one)
    return direction * ((1 - share) * norms[0] + share * norms[1])


def _line(first: Array, last: Array, count: int) -> Array:
    share = jnp.linspace(0, 1, count)[:, None]
    return (1 - share) * first + share * last


def _length(points: Array, bound: Array) -> Array:
    """[n, d] -> the sum of step lengths times minus the log prior, and what steps are too long."""
    steps = points[1:] - points[:-1]
    lengths = jnp.sqrt((steps**2).sum(-1) + 1e-12)
    norms = jnp.linalg.norm((points[1:] + points[:-1]) / 2, axis=-1)
    cost = -(lengths * log_prior(norms, points.shape[-1])).sum()
    return cost + jax.nn.relu(lengths - bound).sum()


def _settled(loss: Callable[[Any], Array], start: Any, tolerance: float, calm: int) -> Any:
    """Adam until the loss has changed by less than a tolerance for some iterations in a row."""
    optimizer = optax.adam(RATE)

    def goes_on(state: Any) -> Array:
        i, quiet, *_ = state
        return (i < MOST) & (quiet < calm)

    def body(state: Any) -> Any:
        i, quiet, before, values, memory = state
        value, slopes = jax.value_and_grad(loss)(values)
        updates, memory = optimizer.update(slopes, memory)
        quiet = jnp.where(jnp.abs(value - before) < tolerance, quiet + 1, 0)
        return i + 1, quiet, value, optax.apply_updates(values, updates), memory

    zero = jnp.int32(0)
    first = jnp.full((), jnp.inf, jax.tree.leaves(start)[0].dtype)
    state = (zero, zero, first, start, optimizer.init(start))
    return jax.lax.while_loop(goes_on, body, state)[3]

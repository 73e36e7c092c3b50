"""Exponential moving average of the parameters that learn."""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from jaxgen.config import check_positive
from jaxgen.types import Array, Params, UserError, at_least_float32


@dataclass(frozen=True)
class EMA:
    """Moving average of the parameters, as diffusers' `EMAModel` makes it."""

    decay: float = 0.9999
    """Share of the average that stays at each step, at most."""
    warmup: bool = False
    """Let the decay grow as 1 - (1 + k / gamma)^-power, and not as (1 + k) / (10 + k)."""
    power: float = 2 / 3
    """Exponent of the warmup; 2/3 suits a million steps, 3/4 fewer."""
    gamma: float = 1.0
    """Steps over which the warmup sets in."""
    start: int = 0
    """Steps before which the average is the parameters themselves."""

    def __post_init__(self) -> None:
        if not 0 <= self.decay < 1:
            raise UserError(f"decay = {self.decay} is not from 0 to below 1")
        if self.start < 0:
            raise UserError(f"start = {self.start} is below 0")
        check_positive(self, "power", "gamma")


def decay_at(ema: EMA, step: Array) -> Array:
    """[] share of the average that stays at update number `step`, counted from 1."""
    return 1 - _fresh(ema, step)


def init(learned: Params) -> Params:
    """The average before any update: copies, so that either may be donated; float32 at least."""
    return jax.tree.map(lambda leaf: jnp.array(at_least_float32(leaf), copy=True), learned)


def update(ema: EMA, averaged: Params, learned: Params, step: Array) -> Params:
    """The average after update number `step`, counted from 1, which made `learned`."""
    fresh = _fresh(ema, step)

    def blend(average: Array, new: Array) -> Array:
        new = new.astype(average.dtype)
        return jnp.where(fresh == 1, new, average + fresh.astype(average.dtype) * (new - average))

    return jax.tree.map(blend, averaged, learned)


def _fresh(ema: EMA, step: Array) -> Array:
    """[] 1 - decay, which in float32 is exact only if it is not computed as a difference."""
    k = jnp.maximum(step - ema.start - 1, 0).astype(jnp.float32)
    fresh = (1 + k / ema.gamma) ** -ema.power if ema.warmup else 9 / (10 + k)
    return jnp.where(k > 0, jnp.maximum(fresh, 1 - ema.decay), 1.0)

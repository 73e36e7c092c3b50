"""Guidance: several predictions of one network, combined before they are converted."""

from typing import Any

import jax.numpy as jnp

from jaxgen.types import Array, Denoiser, Point, at_least_float32

SLACK = 1e-3  # of a step: 0.3 of 10 steps is 3, however 0.3 is rounded


def holds_a_step(span: tuple[float, float], steps: int) -> bool:
    """Whether any step of a run of so many is within a span, fractions of it, as a whole."""
    low, high = (share * steps for share in span)
    return any(low - SLACK <= i and i + 1 <= high + SLACK for i in range(steps))


def acts(index: Any, steps: Any, low: Any, high: Any) -> Any:
    """Whether guidance acts on a step of so many: low <= index / steps < high."""
    return (index >= low * steps - SLACK) & (index < high * steps - SLACK)


def guide(
    denoise: Denoiser,
    scales: Array,
    rescale: Array | float = 0.0,
    interval: tuple[Array | float, Array | float] = (0.0, 1.0),
) -> Denoiser:
    """A denoiser of B images from one that predicts each under G conditions, in one batch.

    The branches b_0 .. b_{G-1} go from the least to the most conditioned; the guided prediction is
    e = b_0 + sum_j scales[j] * (b_{j+1} - b_j): classifier-free guidance for G = 2 (Ho & Salimans
    2022, eq. 6, whose w is scale - 1), InstructPix2Pix for G = 3 (Brooks et al. 2023, eq. 3).

    Args:
        denoise: x [B, ...] -> raw predictions [B * G, ...], the G branches of an image side by
            side, so that a batch sharded over devices stays where it is; what
            `jaxgen.denoiser.bind` makes of B * G conditions.
        scales: [G - 1], traced; 1 everywhere is the last branch alone.
        rescale: [], traced: the share of e brought to the standard deviation of b_{G-1}, per image
            (Lin et al. 2023, section 3.4); 0 is off.
        interval: two [], traced: guidance acts on the steps with lo <= index / steps < hi, and the
            others predict b_{G-1} exactly (Kynkäänniemi et al. 2024).
    """
    scales = jnp.asarray(scales)
    count = scales.shape[0] + 1
    low, high = interval

    def guided(x: Array, point: Point) -> Array:
        branches = at_least_float32(denoise(x, point))
        branches = branches.reshape(x.shape[0], count, *branches.shape[1:])
        last = branches[:, -1]

        # No matrix product, which accelerators may do in half precision.
        ways = scales.reshape(-1, *[1] * (branches.ndim - 2)) * jnp.diff(branches, axis=1)
        e = branches[:, 0] + ways.sum(1)
        e = rescale * (e * _std_ratio(last, e)) + (1 - rescale) * e

        return jnp.where(acts(point.index, point.steps, low, high), e, last)

    return guided


def _std_ratio(numerator: Array, denominator: Array) -> Array:
    """Standard deviations over all axes of [B, ...] but the first, one by the other: [B, 1, ...].

    A constant counts as 1: the prediction of a network fresh from zeros has a finite gradient too.
    The divisor, n or n - 1, cancels.
    """
    axes = tuple(range(1, numerator.ndim))
    top, bottom = (jnp.var(e, axes, keepdims=True) for e in (numerator, denominator))
    return jnp.sqrt(jnp.where(top > 0, top, 1) / jnp.where(bottom > 0, bottom, 1))

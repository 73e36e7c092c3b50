"""The few types that every room of the house speaks of."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array
Params = dict[str, Any]  # nested dicts; a leaf is an array, its path is its name
Cache = dict[str, Any]  # nested like Params: what a network computes once per image


class UserError(ValueError):
    """A bad value from outside. The command prints it on one line and exits with code 2."""


class Point(NamedTuple):
    """Where a sampler stands: x = signal * clean + noise * eps.

    Computed on the host in float64. On a grid each field has a leading axis [S], noisiest first.
    The two pairs of coefficients make the parameterisation of the network (epsilon, v or clean
    sample) a matter of numbers, so that no sampler asks for it.
    """

    time: Array  # [] what the network is told; may be fractional
    scale: Array  # [] the network reads scale * x, which has unit variance
    signal: Array  # [] share of the clean latent in x, here
    noise: Array  # [] share of the noise in x, here
    signal_next: Array  # [] and after the step
    noise_next: Array  # []
    keep: Array  # [] share of the predicted noise kept by a step: keep^2 + fresh^2 = noise_next^2
    fresh: Array  # [] share of new noise that a stochastic step adds; 0 adds none
    clean: Array  # [2] clean = clean[0] * x + clean[1] * prediction
    eps: Array  # [2] eps = eps[0] * x + eps[1] * prediction
    weights: Array  # [K] the bound of clean latents (inf is none), then the sampler's own numbers
    index: Array  # type: ignore[assignment]  # [] steps done; integer
    steps: Array  # [] steps in all; integer

    def split(self, x: Array, prediction: Array) -> tuple[Array, Array]:
        """(noisy x, the network's raw prediction) -> (clean latent, eps), all of one shape."""
        clean = self.clean[0] * x + self.clean[1] * prediction
        eps = self.eps[0] * x + self.eps[1] * prediction
        return clean, eps


Denoiser = Callable[[Array, Point], Array]  # (noisy x, point) -> raw prediction, like x
# (what `guide` takes has more rows than x: those of an image under each condition, side by side)


def at_least_float32(x: Array) -> Array:
    """Norms, softmax, schedules and sampler state never compute in less (float64 stays float64)."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


# Without it, accelerators may multiply float32 numbers with 8 or 10 bits of mantissa.
# Decorates whatever applies a network. Not measured on an accelerator yet.
full_precision = jax.default_matmul_precision("float32")


class Residuals(NamedTuple):
    """What a branch adds inside a UNet; B as in `Inputs`."""

    middle: Array  # [B, h, w, C] to what the middle block makes
    skips: tuple[Array, ...]  # to each skip, first to last, or to none; all may be [B, 1, 1, C]


class Control(NamedTuple):
    """What a ControlNet is given."""

    hint: Array  # [1, H, W, C] in [0, 1] for the whole batch, or one for each image
    weights: Array  # [n + 1] of the residuals: skips, first to last, then the middle
    span: tuple[Array, ...] = ()  # two []: the part of a run in which it acts; without, always
    texts: tuple[Array, ...] = ()  # [images, G, T, D] `Inputs.text`, if the last of G alone sees it


class Inputs(NamedTuple):
    """What conditions a batch of denoising. Absent is empty, never None.

    B are the images, or under guidance each image's conditions, side by side.
    """

    text: Array  # [B, T, D] token embeddings of the prompts
    concat: tuple[Array, ...] = ()  # [B, H, W, C] each: channels the UNet reads beside x
    added: tuple[Array, ...] = ()  # SDXL: pooled text [B, P] and time ids [B, 6]
    guidance: tuple[Array, ...] = ()  # distilled UNets: guidance scale [B]
    controls: tuple[Control, ...] = ()  # one for each ControlNet

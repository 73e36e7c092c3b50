"""Group and layer normalisation, two-pass, in float32 at least. Channels last."""

from typing import NamedTuple

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from jaxgen.types import Array, at_least_float32


class Affine(NamedTuple):
    """(x - mean) * scale + bias; [B, 1, ..., C] each, float32 at least."""

    mean: Array
    scale: Array
    bias: Array


def normalise(x: Array, norm: Affine) -> Array:
    """[B, ..., C] -> the same shape and dtype."""
    return ((at_least_float32(x) - norm.mean) * norm.scale + norm.bias).astype(x.dtype)


def silu_of(x: Array, norm: Affine | None) -> Array:
    """The SiLU of x normalised; x itself where there is no norm."""
    return x if norm is None else nn.silu(normalise(x, norm))


class GroupNorm(nn.Module):
    """Group normalisation with the two-pass variance: the fast one loses 1e-3 at large means."""

    groups: int
    epsilon: float

    def __call__(self, x: Array) -> Array:
        """[B, ..., C] -> the same shape."""
        return normalise(x, self.affine(x))

    @nn.compact
    def affine(self, x: Array) -> Affine:
        """[B, ..., C] -> the norm as an affine map of each image's channels."""
        channels = x.shape[-1]
        scale = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))

        h = at_least_float32(x).reshape(x.shape[0], -1, channels)
        mean = self._over_groups(h.mean(1))
        variance = self._over_groups(jnp.square(h - mean[:, None]).mean(1))
        shape = (x.shape[0], *(1,) * (x.ndim - 2), channels)
        mean, factor = (a.reshape(shape) for a in (mean, lax.rsqrt(variance + self.epsilon)))
        return Affine(mean, factor * scale, jnp.broadcast_to(bias, shape))

    def _over_groups(self, per_channel: Array) -> Array:
        """[B, C] -> the mean of each channel's group, [B, C].

        Channels first are averaged alone: a CPU sums along the last axis but one many times
        faster than within short groups of the last.
        """
        batch, channels = per_channel.shape
        means = per_channel.reshape(batch, self.groups, -1).mean(-1)
        return jnp.repeat(means, channels // self.groups, axis=-1)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, two-pass."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., C] -> the same shape."""
        scale = self.param("scale", nn.initializers.ones, x.shape[-1:])
        bias = self.param("bias", nn.initializers.zeros, x.shape[-1:])

        h = at_least_float32(x)
        h = h - h.mean(-1, keepdims=True)
        h = h * lax.rsqrt(jnp.square(h).mean(-1, keepdims=True) + self.epsilon)
        return (h * scale + bias).astype(x.dtype)

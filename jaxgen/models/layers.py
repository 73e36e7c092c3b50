"""Linear maps, convolutions, and the residual block that UNet and VAE share.

Channels last. Layers compute in the dtype of their parameters.
"""

import math
from functools import partial

import flax.linen as nn
import jax.numpy as jnp
import numpy as np

from jaxgen.models.convolution import convolve, resize_nearest
from jaxgen.models.correlation import Padding
from jaxgen.models.norms import Affine, GroupNorm
from jaxgen.types import Array, Params, at_least_float32

_kernel_init = nn.initializers.lecun_normal()


def linear(params: Params, x: Array) -> Array:
    """[..., I] -> [..., O] by `kernel` [I, O] and, where present, `bias` [O]."""
    y = x @ params["kernel"]
    return y + params["bias"] if "bias" in params else y


class Dense(nn.Module):
    """A linear map over the last axis."""

    features: int
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[..., I] -> [..., features]."""
        params = {"kernel": self.param("kernel", _kernel_init, (x.shape[-1], self.features))}
        if self.use_bias:
            params["bias"] = self.param("bias", nn.initializers.zeros, (self.features,))
        return linear(params, x)


class Conv(nn.Module):
    """A 2D convolution with explicit padding, since string paddings differ from PyTorch's."""

    features: int
    kernel: int = 3
    stride: int = 1
    padding: Padding = ((1, 1), (1, 1))
    use_bias: bool = True

    @nn.compact
    def __call__(self, x: Array, norm: Affine | None = None, doubled: bool = False) -> Array:
        """[B, H, W, I] -> [B, H', W', features].

        Args:
            norm: of `GroupNorm.affine`; x is normalised and passes a SiLU first.
            doubled: convolves the image at twice its size by nearest neighbour.
        """
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", _kernel_init, shape)
        bias = self.param("bias", nn.initializers.zeros, shape[-1:]) if self.use_bias else None
        padding = self.padding if self.kernel > 1 else ((0, 0), (0, 0))
        return convolve(x, kernel, bias, self.stride, padding, norm, doubled)


def repeat_rows(x: Array, rows: int) -> Array:
    """[B, ...] -> [rows, ...]: each row equally often, its copies side by side.

    Under guidance an image comes once, and is as many rows as it has conditions from where the
    first condition is met.
    """
    if rows % len(x):
        raise ValueError(f"{rows} rows of conditions are no multiple of {len(x)} images")
    return x if len(x) == rows else jnp.repeat(x, rows // len(x), axis=0)


class ResBlock(nn.Module):
    """Residual convolution block, shifted by the time embedding where there is one.

    Submodules carry the names they have in released checkpoints, so loading one is a rename rule
    and never a table.

    Attributes:
        features: output channels; when they differ from C, the skip path is a 1x1 convolution.
        groups: GroupNorm groups; must divide both C and `features`.
        epsilon: GroupNorm epsilon; Stable Diffusion uses 1e-5 in the UNet and 1e-6 in the VAE.
    """

    features: int
    groups: int = 32
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: Array, temb: Array | None = None) -> Array:
        """[B, H, W, C], time embedding [B, E], or fewer that divide B -> [B, H, W, features]."""
        norm = partial(GroupNorm, self.groups, self.epsilon)
        conv = partial(Conv, self.features)

        h = conv(name="conv1")(x, norm(name="norm1").affine(x))
        if temb is not None:  # the VAE's blocks have none
            shift = Dense(self.features, name="time_emb_proj")(nn.silu(temb))
            h = h + repeat_rows(shift, len(h))[:, None, None, :]
        h = conv(name="conv2")(h, norm(name="norm2").affine(h))

        if x.shape[-1] != self.features:
            x = conv(kernel=1, name="conv_shortcut")(x)
        return x + h


class Downsample(nn.Module):
    """Halves height and width by a strided convolution."""

    features: int
    padding: Padding = ((1, 1), (1, 1))

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, ~H/2, ~W/2, features]."""
        return Conv(self.features, stride=2, padding=self.padding, name="conv")(x)


class Upsample(nn.Module):
    """Enlarges by nearest neighbour, then convolves."""

    features: int

    @nn.compact
    def __call__(self, x: Array, height: int, width: int) -> Array:
        """[B, H, W, C] -> [B, height, width, features]."""
        doubled = (height, width) == (2 * x.shape[1], 2 * x.shape[2])
        x = x if doubled else resize_nearest(x, height, width)
        return Conv(self.features, name="conv")(x, doubled=doubled)


def sinusoids(value: Array, features: int, shift: float = 0.0, cosine_first: bool = True) -> Array:
    """Sinusoidal embedding (Vaswani et al. 2017) of numbers [...] -> [..., features].

    Args:
        shift: `freq_shift` of the checkpoint; Stable Diffusion has 0.
        cosine_first: Stable Diffusion's order (`flip_sin_to_cos`).
    """
    value = at_least_float32(jnp.asarray(value))
    half = features // 2
    # At time 999 one unit in a frequency's last place shows: rounded where PyTorch rounds them.
    exponent = -math.log(10000.0) * np.arange(half, dtype=value.dtype) / (half - shift)
    angle = value[..., None] * np.exp(exponent.astype(np.float64)).astype(value.dtype)
    pair = [jnp.cos(angle), jnp.sin(angle)] if cosine_first else [jnp.sin(angle), jnp.cos(angle)]
    return jnp.concatenate(pair, -1)


class EmbeddingMLP(nn.Module):
    """Two linear layers that turn a sinusoidal embedding into the network's own."""

    features: int
    condition: int = 0  # width of a guidance embedding added before the first layer

    @nn.compact
    def __call__(self, x: Array, condition: tuple[Array, ...] = ()) -> Array:
        """[B, I], and perhaps a guidance embedding [B, condition] -> [B, features]."""
        if self.condition:
            x = x + Dense(x.shape[-1], use_bias=False, name="cond_proj")(*condition)
        return Dense(self.features, name="linear_2")(
            nn.silu(Dense(self.features, name="linear_1")(x))
        )

"""The convolution of a layer: normalised, activated, perhaps doubled image, and a bias.

On accelerators it is XLA's; on a CPU it and its gradients each take the form that is fastest there.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jaxgen.models import winograd
from jaxgen.models.correlation import SAME, Padding, correlate, plain
from jaxgen.models.norms import Affine, silu_of
from jaxgen.types import Array


def convolve(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    stride: int = 1,
    padding: Padding = SAME,
    norm: Affine | None = None,
    doubled: bool = False,
) -> Array:
    """[B, H, W, I] by [K, K, I, O] -> [B, H', W', O].

    Args:
        norm: of `GroupNorm.affine`; x is normalised and passes a SiLU first.
        doubled: convolves the image at twice its size by nearest neighbour.
    """
    if len(kernel) == stride == 1:
        y = silu_of(x, norm) @ kernel[0, 0]
    elif jax.default_backend() == "cpu":
        return _on_cpu(x, kernel, bias, norm, stride, padding, doubled)
    else:
        y = plain(_activated(x, norm, doubled), kernel, stride, padding)
    return y if bias is None else y + bias


def resize_nearest(x: Array, height: int, width: int) -> Array:
    """[B, H, W, C] -> [B, height, width, C], source index floor(i * in / out).

    As in PyTorch for the sizes 2n and 2n - 1 of a UNet (PyTorch rounds the product elsewhere).
    """
    if (height, width) == (2 * x.shape[1], 2 * x.shape[2]):
        return jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
    rows = jnp.arange(height) * x.shape[1] // height
    columns = jnp.arange(width) * x.shape[2] // width
    return x[:, rows][:, :, columns]


def _activated(x: Array, norm: Affine | None, doubled: bool) -> Array:
    x = silu_of(x, norm)
    return resize_nearest(x, 2 * x.shape[1], 2 * x.shape[2]) if doubled else x


@partial(jax.custom_jvp, nondiff_argnums=(4, 5, 6))
def _on_cpu(
    x: Array,
    kernel: Array,
    bias: Array | None,
    norm: Affine | None,
    stride: int,
    padding: Padding,
    doubled: bool,
) -> Array:
    simple = (len(kernel), stride, padding) == (3, 1, SAME)
    if simple and winograd.pays(x, kernel, doubled):
        return winograd.convolve(x, kernel, bias, norm, doubled)
    y = correlate(_activated(x, norm, doubled), kernel, stride, padding)
    return y if bias is None else y + bias


@partial(_on_cpu.defjvp, symbolic_zeros=True)
def _on_cpu_jvp(
    stride: int, padding: Padding, doubled: bool, primals: tuple, tangents: tuple
) -> tuple[Array, Array]:
    """What is not differentiated costs nothing: its tangent is a symbolic zero."""
    x, kernel, _, norm = primals
    dx, dkernel, dbias, dnorm = tangents
    activated = partial(_activated, doubled=doubled)
    product = partial(correlate, stride=stride, padding=padding)

    y = _on_cpu(*primals, stride, padding, doubled)
    dy = jnp.zeros_like(y)
    if not all(map(_is_zero, (dx, *(dnorm or ())))):
        moves = jax.tree.map(_dense, (dx, dnorm), is_leaf=_is_zero)
        dy += product(jax.jvp(activated, (x, norm), moves)[1], kernel)
    if not _is_zero(dkernel):
        dy += product(activated(x, norm), dkernel)
    if dbias is not None and not _is_zero(dbias):
        dy += dbias
    return y, dy


def _is_zero(tangent: Any) -> bool:
    return isinstance(tangent, SymbolicZero)


def _dense(tangent: Any) -> Array:
    return jnp.zeros(tangent.shape, tangent.dtype) if _is_zero(tangent) else tangent

"""3x3 convolutions with a quarter of the products, for CPUs (Winograd; Lavin & Gray 2016).

A tile of the image, a kernel and a tile of the result are each mapped by a small matrix, so that
between them stands one product per point instead of nine per pixel. Exact but for rounding.
XLA's own convolution runs close to the processor's matrix peak: only doing less is faster.
"""

from functools import partial
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jaxgen.types import Array, at_least_float32

TILES = 256  # tiles at a time
KERNELS = 36 * 2**17  # numbers of transformed kernels at a time
LARGE = 2**26  # numbers of an image that is not normalised as a whole
MIN_OUTPUTS = 64  # channels of the result at a time, at least
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
SAME = ((1, 1), (1, 1))
Norm = tuple[Array, ...]  # mean, scale and bias, [B, 1, 1, C]; or nothing


class Form(NamedTuple):
    """Minimal filtering along one axis: result @ ((kernel @ g) * (image @ d)), for taps g."""

    image: np.ndarray  # [points, reads]
    kernel: np.ndarray  # [points, 3]
    result: np.ndarray  # [writes, points]
    step: int  # pixels from one tile to the next


def toom_cook(points: tuple[float, ...]) -> Form:
    """The form that evaluates polynomials at some points and at infinity.

    Writes len(points) - 1 pixels of a tile with len(points) + 1 products.
    """
    p, count = np.array(points), len(points)
    image, kernel = np.zeros((count + 1, count + 1)), np.zeros((count + 1, 3))
    for i in range(count):
        others = np.delete(p, i)
        image[i, :count] = np.poly(others)[::-1] / np.prod(p[i] - others)
        kernel[i] = p[i] ** np.arange(3)
    image[count], kernel[count] = np.poly(p)[::-1], (0, 0, 1)
    result = np.zeros((count - 1, count + 1))
    result[:, :count] = p ** np.arange(count - 1)[:, None]
    result[-1, count] = 1
    return Form(image, kernel, result, step=count - 1)


# Irrational points, because they lie evenly: with 0, 1, -1, 2, -2 rounding is five times larger
# (compare Barabasz et al. 2020). This way it is 4e-6 of the largest value in float32.
PLAIN = toom_cook((0, 0.5**0.5, -(0.5**0.5), 2**0.5, -(2**0.5)))

# A convolution of the image doubled by nearest neighbour: with pixels a, b, c and taps f, g, h the
# two results at b are b(f + g + h) - (b - a)f and b(f + g + h) + (c - b)h, which share a product.
DOUBLED = Form(
    image=np.array([[-1, 1, 0], [0, 1, 0], [0, -1, 1]]),
    kernel=np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]]),
    result=np.array([[-1, 1, 0], [0, 1, 1]]),
    step=1,
)


def pays(x: Array, kernel: Array, doubled: bool = False) -> bool:
    """Whether a 3x3 convolution of stride 1 is faster this way.

    Measured on x86: small images leave too little work to pay for transforming the kernel, except
    where the image is doubled (which saves more), and few channels too little to pay for
    transforming the image (benchmarks/README.md).
    """
    batch, height, width, inputs = x.shape
    exact = x.dtype in (jnp.float32, jnp.float64) and x.dtype == kernel.dtype
    large = doubled or batch * height * width >= 512
    return exact and large and min(inputs, kernel.shape[-1]) >= 128


@partial(jax.custom_jvp, nondiff_argnums=(4,))
def convolve(x: Array, kernel: Array, bias: Array, norm: Norm = (), doubled: bool = False) -> Array:
    """[B, H, W, I] by [3, 3, I, O], padded by 1 -> [B, H, W, O]; or [B, 2H, 2W, O] if `doubled`.

    `norm`, where there is one, acts on x first; a strip at a time, so that what it makes of the
    whole image never exists. Memory is that of the result and little more.
    """
    form = DOUBLED if doubled else PLAIN
    image, taps, result = (jnp.asarray(np.kron(m, m), x.dtype) for m in form[:3])
    (writes, points), reads, step = form.result.shape, form.image.shape[1], form.step
    batch, height, width, inputs = x.shape

    if x.size < LARGE:
        x, norm = activate(x, norm), ()

    # Tiles, `rows` x `across` in each of some strips, the last of which may reach past the image.
    down, across = -(-height // step), -(-width // step)
    strips = -(-down // max(1, TILES // (batch * across)))
    rows = -(-down // strips)
    lines, columns = step * rows, step * across  # of a strip, and one more on each side
    outputs = _block(kernel.shape[-1], points**2 * inputs)
    x = jnp.pad(x, ((0, 0), (0, lines * strips - height), (0, 0), (0, 0)))

    def strip(i: Array, y: Array) -> Array:
        first = lines * i
        starts = ((first - 1, 1), (first, lines), (first + lines, 1))  # clamped at the edges
        block = jnp.concatenate([lax.dynamic_slice_in_dim(x, at, n, 1) for at, n in starts], 1)
        number = first - 1 + jnp.arange(lines + 2)[:, None, None]
        block = jnp.where((number >= 0) & (number < height), activate(block, norm), 0)
        # Not by jnp.pad, which would be fused with the activation into a loop with branches.
        edges = [
            jnp.zeros((batch, lines + 2, n, inputs), x.dtype) for n in (1, columns + 1 - width)
        ]
        block = jnp.concatenate([edges[0], block, edges[1]], 2)
        pixels = jnp.stack([block[:, r : r + lines - step + 1 : step] for r in range(reads)])
        pixels = jnp.stack(
            [pixels[:, :, :, c : c + columns - step + 1 : step] for c in range(reads)], 1
        )
        images = (image @ pixels.reshape(reads**2, -1)).reshape(points**2, -1, inputs)

        def some_outputs(j: Array, y: Array) -> Array:
            some = lax.dynamic_slice_in_dim(kernel, outputs * j, outputs, axis=3)
            kernels = (taps @ some.reshape(9, -1)).reshape(-1, inputs, outputs)
            products = jnp.einsum("pti,pio->pto", images, kernels)
            tiles = (result @ products.reshape(points**2, -1)).reshape(
                writes, writes, batch, rows, across, outputs
            )
            tiles += lax.dynamic_slice_in_dim(bias, outputs * j, outputs)
            tiles = tiles.transpose(2, 3, 0, 4, 1, 5).reshape(batch, writes * rows, -1, outputs)
            return lax.dynamic_update_slice(y, tiles, (0, writes * rows * i, 0, outputs * j))

        return lax.fori_loop(0, kernel.shape[-1] // outputs, some_outputs, y)

    # What it holds at first does not matter; being made of x, it is not made before x is there.
    y = jnp.full((batch, strips * rows * writes, writes * across, kernel.shape[-1]), x[0, 0, 0, 0])
    y = lax.fori_loop(0, strips, strip, y)
    scale = 1 + doubled
    return y[:, : scale * height, : scale * width]


def activate(x: Array, norm: Norm) -> Array:
    """A normalised image through the SiLU, or the image as it is where there is no norm."""
    return nn.silu(normalise(x, *norm)) if norm else x


def normalise(x: Array, mean: Array, scale: Array, bias: Array) -> Array:
    """(x - mean) * scale + bias, in float32 at least."""
    return ((at_least_float32(x) - mean) * scale + bias).astype(x.dtype)


def _block(outputs: int, size: int) -> int:
    """How many outputs at a time, so that their transformed kernels stay in the cache."""
    most = max(MIN_OUTPUTS, KERNELS // size)
    return next(n for n in range(min(outputs, most), 0, -1) if outputs % n == 0)


@partial(convolve.defjvp, symbolic_zeros=True)
def _convolve_jvp(doubled: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Derivatives go through the plain convolution, whose transposes keep no tiles in memory.

    What is not differentiated costs nothing: its tangent is a symbolic zero.
    """

    def plain(x: Array, kernel: Array) -> Array:
        if doubled:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=DIMENSIONS)

    x, kernel, _, norm = primals
    dx, dkernel, dbias, dnorm = tangents
    still = [isinstance(t, SymbolicZero) for t in (dx, *dnorm)]
    dx, *dnorm = (jnp.zeros(t.shape, t.dtype) if z else t for z, t in zip(still, (dx, *dnorm)))
    y = convolve(*primals, doubled)
    dy = jnp.zeros_like(y)
    seen, dseen = jax.jvp(activate, (x, norm), (dx, tuple(dnorm)))
    if not all(still):
        dy += plain(dseen, kernel)
    if not isinstance(dkernel, SymbolicZero):
        dy += plain(seen, dkernel)
    if not isinstance(dbias, SymbolicZero):
        dy += dbias
    return y, dy

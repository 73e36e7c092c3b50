"""3x3 convolutions with 2.25 times fewer products, for CPUs (Winograd; Lavin & Gray 2016, F(2x2)).

Exact but for rounding, which is that of a plain convolution (1e-6 in float32). XLA's own
convolution runs close to the matrix peak of the processor: only doing less is faster.
"""

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from jaxgen.types import Array

TILES = 256  # output tiles of 2x2 at a time: their 16 products stay in the cache
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
SAME = ((1, 1), (1, 1))


def pays(x: Array, kernel: Array) -> bool:
    """Whether a 3x3 convolution of stride 1 with even sides is faster this way.

    Measured on x86: narrow images leave too little work to pay for transforming the kernel, and few
    channels too little to pay for transforming the image (benchmarks/README.md).
    """
    batch, height, width, inputs = x.shape
    even = height % 2 == 0 and width % 2 == 0
    wide = inputs >= 256 and kernel.shape[-1] >= 256
    exact = x.dtype in (jnp.float32, jnp.float64) and x.dtype == kernel.dtype
    return even and wide and exact and batch * height * width >= 4096


@jax.custom_jvp
def convolve(x: Array, kernel: Array) -> Array:
    """[B, H, W, I] by [3, 3, I, O], padded by 1 -> [B, H, W, O]; H and W are even."""
    batch, height, width, _ = x.shape
    down, across, outputs = height // 2, width // 2, kernel.shape[-1]
    rows = next(
        n for n in range(min(down, max(1, TILES // (batch * across))), 0, -1) if down % n == 0
    )
    x = jnp.pad(x, ((0, 0), *SAME, (0, 0)))
    kernels = _stacked(_both_ways(_kernel, [[kernel[r, c] for c in range(3)] for r in range(3)]))

    def strip(i: Array) -> Array:  # `rows` rows of tiles
        block = lax.dynamic_slice_in_dim(x, 2 * rows * i, 2 * rows + 2, axis=1)
        high, wide = 2 * rows - 1, 2 * across - 1
        corners = [
            [block[:, r : r + high : 2, c : c + wide : 2] for c in range(4)] for r in range(4)
        ]
        images = _stacked(_both_ways(_image, corners)).reshape(16, -1, x.shape[-1])
        products = jnp.einsum("pti,pio->pto", images, kernels)
        products = products.reshape(4, 4, batch, rows, across, outputs)
        ((a, b), (c, d)) = _both_ways(_result, products)
        pixels = jnp.stack([jnp.stack([a, b], 3), jnp.stack([c, d], 3)], 2)
        return pixels.reshape(batch, 2 * rows, width, outputs)

    strips = lax.map(strip, jnp.arange(down // rows))
    return jnp.moveaxis(strips, 0, 1).reshape(batch, height, width, outputs)


@convolve.defjvp
def _convolve_jvp(primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Derivatives go through the plain convolution, whose transposes keep no tiles in memory."""

    def plain(x: Array, kernel: Array) -> Array:
        return lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=DIMENSIONS)

    x, kernel = primals
    dx, dkernel = tangents
    return convolve(x, kernel), plain(dx, kernel) + plain(x, dkernel)


def _kernel(g: Sequence[Array]) -> list[Array]:
    return [g[0], (g[0] + g[1] + g[2]) / 2, (g[0] - g[1] + g[2]) / 2, g[2]]


def _image(d: Sequence[Array]) -> list[Array]:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[1] - d[3]]


def _result(m: Sequence[Array]) -> list[Array]:
    return [m[0] + m[1] + m[2], m[1] - m[2] - m[3]]


def _both_ways(f: Callable, grid: Iterable[Sequence[Array]]) -> list[list[Array]]:
    """A transform of rows, and then of columns, over a grid [row][column] of arrays."""
    columns = [f(column) for column in zip(*(f(row) for row in grid))]
    return [list(row) for row in zip(*columns)]


def _stacked(grid: Iterable[Iterable[Array]]) -> Array:
    return jnp.stack([array for row in grid for array in row])

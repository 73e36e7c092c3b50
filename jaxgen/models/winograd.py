"""3x3 convolutions with a quarter of the products, for CPUs (Winograd; Lavin & Gray 2016).

A tile of the image, a kernel and a tile of the result are each mapped by a small matrix, so that
between them stands one product per point instead of nine per pixel. Exact but for rounding.
XLA's own convolution runs close to the processor's matrix peak: only doing less is faster.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.types import Array

TILES = 256  # tiles at a time
KERNELS = 36 * 2**17  # numbers of transformed kernels at a time
MIN_OUTPUTS = 64  # channels of the result at a time, at least
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
SAME = ((1, 1), (1, 1))


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


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def convolve(x: Array, kernel: Array, doubled: bool = False) -> Array:
    """[B, H, W, I] by [3, 3, I, O], padded by 1 -> [B, H, W, O]; or [B, 2H, 2W, O] if `doubled`."""
    form = DOUBLED if doubled else PLAIN
    image, taps, result = (jnp.asarray(np.kron(m, m), x.dtype) for m in form[:3])
    (writes, points), reads, step = form.result.shape, form.image.shape[1], form.step
    batch, height, width, inputs = x.shape

    # Tiles, `rows` x `across` in each of some strips, the last of which may reach past the image.
    down, across = -(-height // step), -(-width // step)
    strips = -(-down // max(1, TILES // (batch * across)))
    rows = -(-down // strips)
    high, wide = step * (rows - 1) + 1, step * (across - 1) + 1
    below, right = step * (strips * rows - 1) + reads - 1 - height, wide + reads - 2 - width
    padded = jnp.pad(x, ((0, 0), (1, below), (1, right), (0, 0)))
    outputs = _block(kernel.shape[-1], points**2 * inputs)

    def strip(i: Array, y: Array) -> Array:
        block = lax.dynamic_slice_in_dim(padded, step * rows * i, high + reads - 1, axis=1)
        lines = jnp.stack([block[:, r : r + high : step] for r in range(reads)])
        pixels = jnp.stack([lines[:, :, :, c : c + wide : step] for c in range(reads)], 1)
        images = (image @ pixels.reshape(reads**2, -1)).reshape(points**2, -1, inputs)

        def some_outputs(j: Array, y: Array) -> Array:
            some = lax.dynamic_slice_in_dim(kernel, outputs * j, outputs, axis=3)
            kernels = (taps @ some.reshape(9, -1)).reshape(-1, inputs, outputs)
            products = jnp.einsum("pti,pio->pto", images, kernels)
            tiles = (result @ products.reshape(points**2, -1)).reshape(
                writes, writes, batch, rows, across, outputs
            )
            tiles = tiles.transpose(2, 3, 0, 4, 1, 5).reshape(batch, writes * rows, -1, outputs)
            return lax.dynamic_update_slice(y, tiles, (0, writes * rows * i, 0, outputs * j))

        return lax.fori_loop(0, kernel.shape[-1] // outputs, some_outputs, y)

    # What it holds at first does not matter; being made of x, it is not made before x is there.
    y = jnp.full((batch, strips * rows * writes, writes * across, kernel.shape[-1]), x[0, 0, 0, 0])
    y = lax.fori_loop(0, strips, strip, y)
    scale = 1 + doubled
    return y[:, : scale * height, : scale * width]


def _block(outputs: int, size: int) -> int:
    """How many outputs at a time, so that their transformed kernels stay in the cache."""
    most = max(MIN_OUTPUTS, KERNELS // size)
    return next(n for n in range(min(outputs, most), 0, -1) if outputs % n == 0)


@convolve.defjvp
def _convolve_jvp(doubled: bool, primals: tuple, tangents: tuple) -> tuple[Array, Array]:
    """Derivatives go through the plain convolution, whose transposes keep no tiles in memory."""

    def plain(x: Array, kernel: Array) -> Array:
        if doubled:
            x = jnp.repeat(jnp.repeat(x, 2, axis=1), 2, axis=2)
        return lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=DIMENSIONS)

    x, kernel = primals
    dx, dkernel = tangents
    return convolve(x, kernel, doubled), plain(dx, kernel) + plain(x, dkernel)

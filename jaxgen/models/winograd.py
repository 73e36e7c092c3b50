"""3x3 convolutions with a quarter to half of the products, for CPUs (Winograd; Lavin & Gray 2016).

A tile of the image, a kernel and a tile of the result are each mapped by a small matrix, so that
between them stands one product per point instead of nine per pixel. Exact but for rounding.
XLA's own convolution runs close to the processor's matrix peak: only doing less is faster.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jaxgen.models.norms import Affine, silu_of
from jaxgen.types import Array

TILES = 256  # tiles at a time
FEW = 64  # tiles of PLAIN, under which a convolution takes those of SMALL
KERNELS = 36 * 2**17  # numbers of transformed kernels at a time
LARGE = 2**26  # numbers of an image that is not normalised as a whole
MIN_OUTPUTS = 64  # channels of the result at a time, at least; a product of odd ones is slow
SUMMED = 1024  # tiles at a time whose products are summed to the gradient of a kernel


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
# Smaller tiles have 16 products for 4 pixels, not 36 for 16. That is more work in all, but where
# there are few tiles it is done faster: products of four times as many rows, with kernels that are
# 16 numbers for 9 instead of 36 and so come through the caches sooner (benchmarks/kernels.py).
SMALL = toom_cook((0, 1, -1))

# A convolution of the image doubled by nearest neighbour: with pixels a, b, c and taps f, g, h the
# two results at b are b(f + g + h) - (b - a)f and b(f + g + h) + (c - b)h, which share a product.
DOUBLED = Form(
    image=np.array([[-1, 1, 0], [0, 1, 0], [0, -1, 1]]),
    kernel=np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]]),
    result=np.array([[-1, 1, 0], [0, 1, 1]]),
    step=1,
)


def pays(x: Array, kernel: Array, doubled: bool = False, gradient: bool = False) -> bool:
    """Whether a 3x3 convolution of stride 1 is faster this way, or its kernel's gradient.

    Measured on x86: small images leave too little work to pay for transforming the kernel, except
    where the image is doubled (which saves more), and few channels too little to pay for
    transforming the image, unless it is the gradient of the kernel, at which XLA's form is slow
    (benchmarks/kernels.py).
    """
    batch, height, width, inputs = x.shape
    exact = x.dtype in (jnp.float32, jnp.float64) and x.dtype == kernel.dtype
    large = doubled or batch * height * width >= 512
    return exact and large and min(inputs, kernel.shape[-1]) >= (32 if gradient else 64)


def convolve(
    x: Array,
    kernel: Array,
    bias: Array | None = None,
    norm: Affine | None = None,
    doubled: bool = False,
    transposed: bool = False,
) -> Array:
    """[B, H, W, I] by [3, 3, I, O], padded by 1 -> [B, H, W, O]; or [B, 2H, 2W, O] if `doubled`.

    Where there is a `norm`, x is normalised and passes a SiLU first; of images over LARGE a strip
    at a time, so that the result is all the memory it takes. If `transposed`, the kernel is
    [3, 3, O, I] and turned by 180 degrees: x is the gradient of a result, and the result that of
    its image.
    """
    batch, height, width, inputs = x.shape
    few = batch * -(-height // PLAIN.step) * -(-width // PLAIN.step) < FEW
    form = DOUBLED if doubled else SMALL if few else PLAIN
    taps = form.kernel[:, ::-1] if transposed else form.kernel
    axis = 2 if transposed else 3
    points, writes, outputs = len(form.image), len(form.result), kernel.shape[axis]
    if x.size < LARGE:
        x, norm = silu_of(x, norm), None
    # Bound to x, the kernel is no constant of a loop around: for the gradient of a scan, JAX would
    # transform all of it once and keep that in memory, four times the kernel's. Nothing of x is
    # enough, and is no reason for devices to meet.
    kernel, _ = lax.optimization_barrier((kernel, x[:, :0]))

    # Tiles: `rows` x `across` in a strip; their products with `part` outputs stay in the cache.
    down, across = -(-height // form.step), -(-width // form.step)
    strips = -(-down // max(1, TILES // (batch * across)))
    rows = -(-down // strips)
    part = _part(outputs, KERNELS // (points**2 * inputs))
    x = jnp.pad(x, ((0, 0), (0, form.step * down - height), (0, 0), (0, 0)))

    def strip(i: Array, y: Array) -> Array:
        top = jnp.minimum(rows * i, down - rows)  # the last strip may do some tiles again
        lines = _lines(x, norm, form.step * top, form.step * rows, height)
        images = _images(form, lines, rows, across)

        def some_outputs(j: Array, y: Array) -> Array:
            kernels = lax.dynamic_slice_in_dim(kernel, part * j, part, axis)
            kernels = _transform(taps, kernels.reshape(9, *kernels.shape[2:]))
            tiles = _transform(form.result, _products(images, kernels, transposed))
            if bias is not None:
                tiles += lax.dynamic_slice_in_dim(bias, part * j, part)
            tiles = tiles.reshape(writes, writes, batch, rows, across, part)
            pixels = tiles.transpose(2, 3, 0, 4, 1, 5).reshape(batch, writes * rows, -1, part)
            return lax.dynamic_update_slice(y, pixels, (0, writes * top, 0, part * j))

        return lax.fori_loop(0, outputs // part, some_outputs, y)

    # What it holds at first does not matter: made of x, it does not take memory before x does, and
    # of each image's own pixel, so that devices with a part of the batch need not meet.
    y = jnp.broadcast_to(x[:, :1, :1, :1], (batch, writes * down, writes * across, outputs))
    y = lax.fori_loop(0, strips, strip, y)
    return y[:, : height * (1 + doubled), : width * (1 + doubled)]


def kernel_gradient(x: Array, y: Array) -> Array:
    """Images [B, H, W, I] and gradients [B, H, W, O] of results -> of the kernel, [3, 3, I, O].

    The transpose of `convolve` in its kernel: tiles of both are transformed, multiplied point by
    point, and the sum over tiles is transformed back.
    """
    form, (batch, height, width, inputs), outputs = PLAIN, x.shape, y.shape[-1]
    down, across = -(-height // form.step), -(-width // form.step)
    rows = _divisor(down, max(1, SUMMED // (batch * across)))
    part = _part(outputs, KERNELS // (len(form.image) ** 2 * inputs))
    if jax.device_count() > 1:  # a sum over the batch inside of a loop would be one of devices
        rows, part = down, outputs
    below, beside = (0, form.step * down - height), (0, form.step * across - width)
    x = jnp.pad(x, ((0, 0), below, (0, 0), (0, 0)))
    y = jnp.pad(y, ((0, 0), below, beside, (0, 0)))

    def strip(i: Array) -> Array:
        lines = _lines(x, None, form.step * rows * i, form.step * rows, height)
        images = _images(form, lines, rows, across)
        tiles = lax.dynamic_slice_in_dim(y, form.step * rows * i, form.step * rows, axis=1)
        tiles = tiles.reshape(batch, rows, form.step, across, form.step, outputs)
        tiles = tiles.transpose(2, 4, 0, 1, 3, 5).reshape(form.step**2, -1, outputs)
        tiles = _transform(form.result.T, tiles)

        def some_outputs(j: Array) -> Array:
            some = lax.dynamic_slice_in_dim(tiles, part * j, part, axis=2)
            kernels = jnp.einsum("pti,pto->pio", images, some)
            return _transform(form.kernel.T, kernels)

        parts = lax.map(some_outputs, jnp.arange(outputs // part))
        return jnp.moveaxis(parts, 0, 2).reshape(3, 3, inputs, outputs)

    first = strip(jnp.zeros((), int))
    if rows == down:
        return first
    return lax.fori_loop(1, down // rows, lambda i, total: total + strip(i), first)


def _lines(x: Array, norm: Affine | None, first: Array, count: int, height: int) -> Array:
    """Lines first - 1 to first + count of an image, normalised; zero outside it."""
    ends = jnp.maximum(first - 1, 0), jnp.minimum(first + count, x.shape[1] - 1)
    parts = ((ends[0], 1), (first, count), (ends[1], 1))
    lines = jnp.concatenate([lax.dynamic_slice_in_dim(x, at, n, axis=1) for at, n in parts], 1)
    numbers = first - 1 + jnp.arange(count + 2)[:, None, None]
    return jnp.where((numbers >= 0) & (numbers < height), silu_of(lines, norm), 0)


def _images(form: Form, lines: Array, rows: int, across: int) -> Array:
    """[B, lines, W, I] -> transformed tiles [points^2, B * rows * across, I]."""
    batch, count, width, inputs = lines.shape
    reads, step = form.image.shape[1], form.step
    # Edges not by jnp.pad, which would be fused with the norm before it into a loop with branches.
    edges = (
        jnp.zeros((batch, count, n, inputs), lines.dtype) for n in (1, step * across + 1 - width)
    )
    left, right = edges
    lines = jnp.concatenate([left, lines, right], 2)
    down = jnp.stack([lines[:, r : r + step * (rows - 1) + 1 : step] for r in range(reads)])
    pixels = jnp.stack(
        [down[:, :, :, c : c + step * (across - 1) + 1 : step] for c in range(reads)], 1
    )
    return _transform(form.image, pixels.reshape(reads**2, -1, inputs))


def _products(images: Array, kernels: Array, transposed: bool) -> Array:
    """Tiles [P, T, I] by kernels [P, I, O], or [P, O, I] if `transposed`: [P, T, O].

    As one batch, of which nothing is copied: a loop over points would cut out both of each.
    """
    return jnp.einsum("pti,poi->pto" if transposed else "pti,pio->pto", images, kernels)


def _transform(matrix: np.ndarray, x: Array) -> Array:
    """Applies a matrix of a form along both axes of tiles, [n^2, ...] -> [m^2, ...]."""
    return jnp.tensordot(jnp.asarray(np.kron(matrix, matrix), x.dtype), x, 1)


def _part(outputs: int, most: int) -> int:
    """How many outputs at a time: the largest divisor up to `most`, of whole `MIN_OUTPUTS`."""
    unit = MIN_OUTPUTS if outputs % MIN_OUTPUTS == 0 else 1
    return unit * _divisor(outputs // unit, max(MIN_OUTPUTS, most) // unit)


def _divisor(number: int, most: int) -> int:
    """The largest divisor up to `most`."""
    return next(n for n in range(min(number, most), 0, -1) if number % n == 0)

"""The convolution as a primitive of JAX, with its gradients, each in its fastest form on a CPU.

Image, kernel and result enter one number, sum(convolution(image, kernel) * result), that is linear
in each. Its partial derivatives are the convolution, the gradient of its image and that of its
kernel: derivatives of these three are the three again, forwards, backwards and of any order. Each
chooses for itself, by shape, between XLA's form, one matrix product over shifted copies of the
image, and Winograd's tiles; benchmarks/README.md has their speeds.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend.core import Primitive, jaxpr_as_fun
from jax.interpreters import ad, batching, mlir

from jaxgen.models import winograd
from jaxgen.types import Array

Padding = tuple[tuple[int, int], tuple[int, int]]
Wanted = Literal["result", "image", "kernel"]
Form = Callable[..., Array]  # (image, kernel, stride, padding), linear in image and in kernel
DIMENSIONS = ("NHWC", "HWIO", "NHWC")
SAME = ((1, 1), (1, 1))
OPERANDS: dict[Wanted, tuple[Wanted, Wanted]] = {
    "result": ("image", "kernel"),
    "image": ("result", "kernel"),
    "kernel": ("image", "result"),
}


class Geometry(NamedTuple):
    """What the shapes of two of image, kernel and result do not tell of the third."""

    stride: int
    padding: Padding
    height: int  # of the image
    width: int
    size: int  # of the kernel

    @property
    def simple(self) -> bool:
        """Whether the result is as large as the image, and the kernel 3x3."""
        return (self.size, self.stride, self.padding) == (3, 1, SAME)


def correlate(x: Array, kernel: Array, stride: int = 1, padding: Padding = SAME) -> Array:
    """Image [B, H, W, I] by [K, K, I, O] -> [B, H', W', O]."""
    _, height, width, _ = x.shape
    return _bind("result", x, kernel, Geometry(stride, padding, height, width, len(kernel)))


def plain(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """XLA's form."""
    return lax.conv_general_dilated(
        x, kernel, (stride, stride), padding, dimension_numbers=DIMENSIONS
    )


def patched(x: Array, kernel: Array, stride: int, padding: Padding) -> Array:
    """One matrix product over shifted copies of the image."""
    size, _, inputs, outputs = kernel.shape
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    height, width = ((n - size) // stride + 1 for n in x.shape[1:3])
    shifted = [
        x[:, i : i + stride * (height - 1) + 1 : stride, j : j + stride * (width - 1) + 1 : stride]
        for i in range(size)
        for j in range(size)
    ]
    return jnp.concatenate(shifted, -1) @ kernel.reshape(size * size * inputs, outputs)


def compute(wanted: Wanted, a: Array, b: Array, geometry: Geometry) -> Array:
    """One of the three from the other two, in the form that is fastest on a CPU."""
    image, kernel = _image_and_kernel(wanted, a, b, geometry)
    if geometry.simple and winograd.pays(image, kernel, gradient=wanted == "kernel"):
        if wanted == "kernel":
            return winograd.kernel_gradient(a, b)
        return winograd.convolve(a, b, transposed=wanted == "image")
    return transposed(patched if _wide_and_small(image) else plain, wanted, a, b, geometry)


def transposed(form: Form, wanted: Wanted, a: Array, b: Array, geometry: Geometry) -> Array:
    """One of the three from the other two, in a given form or its transposes."""
    image, kernel = _image_and_kernel(wanted, a, b, geometry)
    form = partial(form, stride=geometry.stride, padding=geometry.padding)
    if wanted == "result":
        return form(a, b)
    if wanted == "image":
        (gradient,) = jax.linear_transpose(lambda x: form(x, b), image)(a)
    else:
        (gradient,) = jax.linear_transpose(lambda k: form(a, k), kernel)(b)
    return gradient


def _image_and_kernel(wanted: Wanted, a: Array, b: Array, geometry: Geometry) -> tuple[Any, Any]:
    """Both, or what is known of them."""
    _, _, height, width, size = geometry
    if wanted == "image":
        return jax.ShapeDtypeStruct((len(a), height, width, b.shape[2]), a.dtype), b
    if wanted == "kernel":
        return a, jax.ShapeDtypeStruct((size, size, a.shape[3], b.shape[3]), a.dtype)
    return a, b


def _wide_and_small(image: Any) -> bool:
    """Where XLA's convolution falls far below its matrix product."""
    return image.shape[3] >= 320 and image.shape[1] * image.shape[2] <= 20 * 20


def _bind(wanted: Wanted, a: Array, b: Array, geometry: Geometry) -> Array:
    # Traced here, so that who looks into the program (to count operations) sees what is done.
    inside = jax.make_jaxpr(partial(compute, wanted, geometry=geometry))(a, b)
    return _correlate.bind(a, b, wanted=wanted, geometry=geometry, inside=inside)


def _transpose(
    operand: int, gradient: Array, a: Any, b: Any, *, wanted: Wanted, geometry: Geometry, **_: Any
) -> Array:
    """Gradient of one of the three -> of the operand that it was computed from."""
    known = {OPERANDS[wanted][0]: a, OPERANDS[wanted][1]: b, wanted: gradient}
    sought = OPERANDS[wanted][operand]
    one, other = OPERANDS[sought]
    return _bind(sought, known[one], known[other], geometry)


def _map(
    operands: tuple, axes: tuple, *, wanted: Wanted, geometry: Geometry, **_: Any
) -> tuple[Array, int]:
    """Mapped over images alone it is a larger batch; XLA's form serves the rest."""
    a, b = operands
    if wanted == "kernel" or axes[1] is not None:
        form = partial(transposed, plain, wanted, geometry=geometry)
        return jax.vmap(form, axes)(a, b), 0
    a = jnp.moveaxis(a, axes[0], 0)
    out = _bind(wanted, a.reshape(-1, *a.shape[2:]), b, geometry)
    return out.reshape(*a.shape[:2], *out.shape[1:]), 0


def _inside(a: Array, b: Array, *, inside: Any, **_: Any) -> Array:
    (out,) = jaxpr_as_fun(inside)(a, b)
    return out


@partial(jax.jit, static_argnames=("wanted", "geometry"))
def _run(a: Array, b: Array, wanted: Wanted, geometry: Geometry) -> Array:
    return compute(wanted, a, b, geometry)


_correlate = Primitive("correlate")
_correlate.def_impl(lambda a, b, *, inside, **how: _run(a, b, **how))
_correlate.def_abstract_eval(lambda a, b, *, inside, **_: inside.out_avals[0])
ad.defbilinear(_correlate, partial(_transpose, 0), partial(_transpose, 1))
batching.primitive_batchers[_correlate] = _map
mlir.register_lowering(_correlate, mlir.lower_fun(_inside, multiple_results=False))

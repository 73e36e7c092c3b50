"""Winograd's convolution against XLA's and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgen.models import winograd
from jaxgen.models.convolution import convolve as chosen_form
from jaxgen.models.correlation import DIMENSIONS, SAME
from jaxgen.models.norms import Affine, silu_of
from tests.torch_oracle import error

RNG = np.random.default_rng(0)


def convolve(x, kernel, doubled=False):
    return winograd.convolve(x, kernel, jnp.zeros(kernel.shape[-1:], x.dtype), None, doubled)


def plain(x, kernel, doubled=False):
    if doubled:
        x = jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
    return lax.conv_general_dilated(x, kernel, (1, 1), SAME, dimension_numbers=DIMENSIONS)


def pair(batch=2, height=12, width=20, inputs=8, outputs=5):
    x = RNG.standard_normal((batch, height, width, inputs), np.float32)
    kernel = RNG.standard_normal((3, 3, inputs, outputs), np.float32)
    return jnp.asarray(x), jnp.asarray(kernel)


@pytest.mark.parametrize("size", [(1, 1), (2, 2), (12, 20), (13, 7), (46, 97)])
@pytest.mark.parametrize("tiles", [1, 16, 256])
@pytest.mark.parametrize("doubled", [False, True])
def test_it_is_the_convolution(size, tiles, doubled, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)
    monkeypatch.setattr(winograd, "MIN_OUTPUTS", 1)
    monkeypatch.setattr(winograd, "KERNELS", 36 * 8 * (3 if tiles == 1 else 1))
    x, kernel = pair(2, *size, outputs=6)
    assert error(convolve(x, kernel, doubled), plain(x, kernel, doubled)) < 5e-6


@pytest.mark.parametrize(("doubled", "most"), [(False, 15), (True, 5)])
def test_rounding_is_small(doubled, most):
    x, kernel = pair(1, 16, 16, 256, 256)
    with jax.enable_x64(True):
        exact = plain(x.astype(jnp.float64), kernel.astype(jnp.float64), doubled)
    ours = error(convolve(x, kernel, doubled), exact)
    assert ours < 5e-6  # half of what a module is allowed
    assert ours < most * error(plain(x, kernel, doubled), exact)


@pytest.mark.parametrize("doubled", [False, True])
def test_it_is_exact_in_float64(doubled):
    with jax.enable_x64(True):
        x, kernel = (a.astype(jnp.float64) for a in pair())
        assert error(convolve(x, kernel, doubled), plain(x, kernel, doubled)) < 1e-14


@pytest.mark.parametrize("size", [(1, 1), (12, 20), (13, 7)])
@pytest.mark.parametrize("strips", [1, 3])
def test_its_transposes_are_the_gradients(size, strips, monkeypatch):
    monkeypatch.setattr(jax, "device_count", lambda: 1)  # on several it does without loops
    monkeypatch.setattr(winograd, "MIN_OUTPUTS", 1)
    monkeypatch.setattr(winograd, "SUMMED", 8 if strips > 1 else 1024)
    monkeypatch.setattr(winograd, "KERNELS", 36 * 8 * (3 if strips > 1 else 6))
    x, kernel = pair(2, *size, outputs=6)
    y, pull = jax.vjp(plain, x, kernel)
    y = jnp.asarray(RNG.standard_normal(y.shape, np.float32))
    for ours, expected in zip(
        (winograd.convolve(y, kernel, transposed=True), winograd.kernel_gradient(x, y)), pull(y)
    ):
        assert error(ours, expected) < 5e-6


def normed(x, kernel, bias, *norm):
    return plain(silu_of(x, Affine(*norm)), kernel) + bias


@pytest.mark.parametrize("large", [0, 2**26], ids=["by strips", "whole"])
def test_norm_and_bias_are_those_of_the_layers_around_it(large, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", 8)
    monkeypatch.setattr(winograd, "LARGE", large)
    x, kernel = pair(2, 13, 9)
    bias = jnp.asarray(RNG.standard_normal(kernel.shape[-1:], np.float32))
    norm = [jnp.asarray(RNG.standard_normal((2, 1, 1, 8), np.float32)) for _ in range(3)]
    args = (x, kernel, bias, *norm)

    def ours(x, kernel, bias, *norm):
        return winograd.convolve(x, kernel, bias, Affine(*norm))

    assert error(ours(*args), normed(*args)) < 5e-6


def test_it_maps_over_a_batch_of_batches():
    x, kernel = pair(6)
    ours = jax.vmap(convolve, (0, None))(x.reshape(3, 2, *x.shape[1:]), kernel)
    assert error(ours.reshape(6, *ours.shape[2:]), plain(x, kernel)) < 5e-6


def test_what_surrounds_the_image_does_not_leak_in():
    x, kernel = pair(1, 9, 9)
    x = x.at[0, 0, 0].set(jnp.inf)  # the result is filled from here before it is written
    ours = convolve(x, kernel)
    assert bool(jnp.isfinite(ours[0, 4:, 4:]).all())


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "chosen"),
    [
        ((2, 64, 64, 320), 320, "float32", True),
        ((2, 63, 64, 320), 320, "float32", True),
        ((2, 16, 16, 1280), 1280, "float32", True),
        ((2, 8, 8, 1280), 1280, "float32", False),
        ((1, 512, 512, 128), 3, "float32", False),
        ((1, 64, 64, 4), 512, "float32", False),
        ((2, 64, 64, 320), 320, "bfloat16", False),
        ((8, 16, 16, 64), 64, "float32", True),
    ],
)
def test_it_is_chosen_where_it_pays(shape, outputs, dtype, chosen):
    x = jax.ShapeDtypeStruct(shape, dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, shape[-1], outputs), dtype)
    assert winograd.pays(x, kernel) == chosen
    assert ("pti,pio" in jax.jit(chosen_form).lower(x, kernel).as_text(debug_info=True)) == chosen
    y = jax.eval_shape(chosen_form, x, kernel)
    slopes = jax.jit(lambda x, kernel, y: jax.vjp(chosen_form, x, kernel)[1](y))
    text = slopes.lower(x, kernel, y).as_text(debug_info=True)
    assert ("pti,poi" in text) == chosen, "for the gradient of the image"
    assert ("pti,pto" in text) == chosen, "for that of the kernel"


@pytest.mark.parametrize(("channels", "chosen"), [(24, False), (32, True), (48, True)])
def test_of_few_channels_the_gradient_of_the_kernel_alone_is_made_so(channels, chosen):
    x = jax.ShapeDtypeStruct((8, 64, 64, channels), "float32")
    kernel = jax.ShapeDtypeStruct((3, 3, channels, channels), "float32")
    y = jax.eval_shape(chosen_form, x, kernel)
    slopes = jax.jit(lambda x, kernel, y: jax.vjp(chosen_form, x, kernel)[1](y))
    text = slopes.lower(x, kernel, y).as_text(debug_info=True)
    assert ("pti,pto" in text) == chosen
    assert "pti,poi" not in text
    assert "pti,pio" not in text

"""Winograd's convolution against XLA's and against float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jaxgen.models import layers, winograd
from tests.torch_oracle import error

RNG = np.random.default_rng(0)


def plain(x, kernel):
    return lax.conv_general_dilated(
        x, kernel, (1, 1), winograd.SAME, dimension_numbers=winograd.DIMENSIONS
    )


def pair(batch=2, height=12, width=20, inputs=8, outputs=5):
    x = RNG.standard_normal((batch, height, width, inputs), np.float32)
    kernel = RNG.standard_normal((3, 3, inputs, outputs), np.float32)
    return jnp.asarray(x), jnp.asarray(kernel)


@pytest.mark.parametrize("size", [(2, 2), (12, 20), (14, 6), (46, 96)])
@pytest.mark.parametrize("tiles", [1, 16, 256])
def test_it_is_the_convolution(size, tiles, monkeypatch):
    monkeypatch.setattr(winograd, "TILES", tiles)
    x, kernel = pair(2, *size)
    assert error(winograd.convolve(x, kernel), plain(x, kernel)) < 2e-6


def test_rounding_is_that_of_a_plain_convolution():
    x, kernel = pair(1, 16, 16, 256, 256)
    with jax.enable_x64(True):
        exact = plain(x.astype(jnp.float64), kernel.astype(jnp.float64))
    assert error(winograd.convolve(x, kernel), exact) < 5 * error(plain(x, kernel), exact)


def test_derivatives_in_both_modes_are_those_of_the_convolution():
    args, directions = pair(), pair()

    def slope(f):
        return jax.grad(lambda *a: jnp.sum(jnp.sin(f(*a))), (0, 1))(*args)

    for ours, theirs in zip(slope(winograd.convolve), slope(plain), strict=True):
        assert error(ours, theirs) < 1e-5
    ours, theirs = (jax.jvp(f, args, directions)[1] for f in (winograd.convolve, plain))
    assert error(ours, theirs) < 2e-6


def test_it_maps_over_a_batch_of_batches():
    x, kernel = pair(6)
    ours = jax.vmap(winograd.convolve, (0, None))(x.reshape(3, 2, *x.shape[1:]), kernel)
    assert error(ours.reshape(6, *ours.shape[2:]), plain(x, kernel)) < 2e-6


@pytest.mark.parametrize(
    ("shape", "outputs", "dtype", "chosen"),
    [
        ((2, 64, 64, 320), 320, "float32", True),
        ((2, 63, 64, 320), 320, "float32", False),
        ((2, 32, 32, 640), 640, "float32", False),
        ((1, 512, 512, 128), 128, "float32", False),
        ((2, 64, 64, 320), 320, "bfloat16", False),
    ],
)
def test_it_is_chosen_where_it_pays(shape, outputs, dtype, chosen):
    x = jax.ShapeDtypeStruct(shape, dtype)
    kernel = jax.ShapeDtypeStruct((3, 3, shape[-1], outputs), dtype)
    assert winograd.pays(x, kernel) == chosen
    traced = str(jax.make_jaxpr(lambda x, k: layers.convolve(x, k, 1, winograd.SAME))(x, kernel))
    assert ("custom_jvp_call" in traced) == chosen

"""Each layer against its counterpart in PyTorch or diffusers."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D

from jaxgen import sharding
from jaxgen.models import layers, winograd
from jaxgen.models.convolution import convolve
from jaxgen.models.correlation import patched
from jaxgen.models.layers import (
    Conv,
    Downsample,
    EmbeddingMLP,
    ResBlock,
    Upsample,
)
from jaxgen.models.norms import GroupNorm, LayerNorm
from tests.torch_oracle import error, nhwc, params_of, quick_jit, randomise

TOLERANCE = 1e-5


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def ours(module, theirs, *inputs):
    """Our module's output under the parameters of theirs."""
    return quick_jit(module.apply)({"params": params_of(theirs)}, *inputs)


@pytest.fixture(params=["plain", "Winograd", "accelerator"])
def form(request, monkeypatch):
    """The ways a convolution may be computed, by hand: layers choose by size and platform."""
    if request.param == "Winograd":
        monkeypatch.setattr(winograd, "pays", lambda *_, **__: True)
    if request.param == "accelerator":
        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")


@pytest.mark.parametrize("features", [32, 64], ids=["identity skip", "conv skip"])
@pytest.mark.parametrize(
    ("embedded", "epsilon"), [(True, 1e-5), (False, 1e-6)], ids=["UNet", "VAE"]
)
def test_resblock_matches_diffusers(features, embedded, epsilon, form):
    theirs = ResnetBlock2D(
        in_channels=32,
        out_channels=features,
        temb_channels=16 if embedded else None,
        groups=8,
        eps=epsilon,
    )
    x, temb = noise(2, 32, 5, 7) + 1, noise(2, 16) if embedded else None
    expected = randomise(theirs)(x, temb)
    given = (nhwc(x), temb.numpy()) if embedded else (nhwc(x),)
    assert error(ours(ResBlock(features, 8, epsilon), theirs, *given), nhwc(expected)) < TOLERANCE


@pytest.mark.parametrize("size", [(8, 8), (5, 8), (7, 3), (2, 2)], ids=str)
@pytest.mark.parametrize("padding", [1, 0], ids=["UNet", "VAE"])
def test_downsample_matches_diffusers(padding, size):
    theirs = randomise(Downsample2D(6, use_conv=True, out_channels=6, padding=padding, name="op"))
    x = noise(2, 6, *size)
    block = Downsample(6) if padding else Downsample(6, ((0, 1), (0, 1)))
    params = {"conv": params_of(theirs)["conv"]}
    assert error(block.apply({"params": params}, nhwc(x)), nhwc(theirs(x))) < TOLERANCE


@pytest.mark.parametrize("size", [None, (6, 10), (5, 9), (5, 10), (7, 13), (3, 5)], ids=str)
def test_upsample_matches_diffusers_at_any_size(size, form):
    theirs = randomise(Upsample2D(6, use_conv=True, out_channels=6))
    x = noise(2, 6, 3, 5)
    height, width = size or (6, 10)
    block = partial(Upsample(6).apply, {"params": params_of(theirs)})
    actual = block(nhwc(x), height, width)
    assert error(actual, nhwc(theirs(x, size))) < TOLERANCE


@pytest.mark.parametrize("mean", [0.0, 30.0, 1000.0])
def test_groupnorm_matches_torch_however_large_the_mean(mean):
    theirs = randomise(torch.nn.GroupNorm(8, 32, eps=1e-6))
    x = noise(2, 32, 5, 7) + mean  # what float32 holds; the truth about it is found in float64
    actual = ours(GroupNorm(8, 1e-6), theirs, nhwc(x))
    # Subtracting a mean of 1000 leaves 1000 * 2^-24 of a unit to be found in the result.
    assert error(actual, nhwc(theirs.double()(x.double()))) < max(TOLERANCE, mean * 1e-7)


@pytest.mark.parametrize("mean", [0.0, 30.0])
def test_layernorm_matches_torch(mean):
    theirs = randomise(torch.nn.LayerNorm(32, eps=1e-5))
    x = noise(2, 7, 32) + mean
    actual = ours(LayerNorm(), theirs, x.numpy())
    assert error(actual, theirs.double()(x.double()).detach()) < TOLERANCE


@pytest.mark.parametrize("norm", [GroupNorm(4, 1e-6), LayerNorm()], ids=["group", "layer"])
def test_norms_of_half_precision_compute_in_float32(norm):
    x = nhwc(3 * noise(1, 16, 4, 4) + 50)
    params = {"scale": jnp.ones(16, jnp.bfloat16), "bias": jnp.zeros(16, jnp.bfloat16)}
    rounded = jnp.asarray(x, jnp.bfloat16)
    actual = norm.apply({"params": params}, rounded)
    exact = norm.apply({"params": params}, rounded.astype(jnp.float32))
    assert actual.dtype == jnp.bfloat16
    np.testing.assert_array_equal(actual, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("cosine_first", [True, False])
def test_sinusoids_match_diffusers_at_fractional_times_too(cosine_first, shift):
    times = torch.tensor([0.0, 1.0, 20.5, 981.0, 999.0, 0.25])
    expected = get_timestep_embedding(
        times, 32, flip_sin_to_cos=cosine_first, downscale_freq_shift=shift
    )
    actual = layers.sinusoids(times.numpy(), 32, shift, cosine_first)
    assert error(actual, expected) < TOLERANCE


def test_sinusoids_are_those_of_the_formula_in_float64():
    times = np.array([3.0, 977.25])
    angle = times[:, None] * np.exp(-np.log(10000.0) * np.arange(8) / 8)
    expected = np.concatenate([np.cos(angle), np.sin(angle)], -1)
    with jax.enable_x64(True):
        np.testing.assert_allclose(layers.sinusoids(times, 16), expected, atol=1e-12)


@pytest.mark.parametrize("condition", [0, 6])
def test_embedding_mlp_matches_diffusers(condition):
    theirs = randomise(TimestepEmbedding(8, 16, cond_proj_dim=condition or None))
    x, extra = noise(3, 8), noise(3, 6)
    expected = theirs(x, extra if condition else None).detach()
    given = (extra.numpy(),) if condition else ()
    assert error(ours(EmbeddingMLP(16, condition), theirs, x.numpy(), given), expected) < TOLERANCE


@pytest.mark.parametrize(
    ("kernel", "stride", "padding"),
    [
        (3, 1, ((1, 1), (1, 1))),
        (3, 2, ((1, 1), (1, 1))),
        (3, 2, ((0, 1), (0, 1))),
        (4, 4, ((0, 0), (0, 0))),
        (1, 1, ((0, 0), (0, 0))),
    ],
)
def test_the_patch_form_of_a_convolution_has_its_values_and_gradients(kernel, stride, padding):
    x = jnp.asarray(nhwc(noise(2, 5, 9, 8)))
    w = jnp.asarray(noise(kernel, kernel, 5, 3, seed=1).numpy())

    def reference(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (stride, stride), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    @partial(quick_jit, static_argnums=0)
    def value_and_gradients(form, x, w):
        y, pull = jax.vjp(form, x, w)
        return y, *pull(jnp.sin(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape))

    expected = value_and_gradients(reference, x, w)
    for form in (patched, convolve):
        actual = value_and_gradients(partial(form, stride=stride, padding=padding), x, w)
        for got, wanted in zip(actual, expected, strict=True):
            assert error(got, wanted) < TOLERANCE


@pytest.mark.parametrize("stride", [1, 2])
def test_a_wide_convolution_matches_torch_in_the_form_chosen_for_it(stride):
    theirs = randomise(torch.nn.Conv2d(640, 4, 3, stride, 1))
    x = noise(1, 640, 5, 6)
    params = params_of(theirs, "conv.")["conv"]
    actual = quick_jit(Conv(4, stride=stride).apply)({"params": params}, nhwc(x))
    assert error(actual, nhwc(theirs(x))) < TOLERANCE


def test_devices_with_a_part_of_the_batch_do_not_wait_for_each_other(monkeypatch):
    monkeypatch.setattr(winograd, "pays", lambda *_, **__: True)
    mesh = sharding.data_mesh(4)
    block = ResBlock(16, groups=4)
    x = sharding.split_batch(jnp.ones((4, 8, 8, 16)), mesh)
    params = sharding.replicate(block.init(jax.random.key(0), x), mesh)
    compiled = jax.jit(block.apply).lower(params, x).compile().as_text()
    assert "while" in compiled
    assert not re.search("all-|collective", compiled)

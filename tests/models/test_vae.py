"""The autoencoder against diffusers' AutoencoderKL."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL

from jaxgen.models.tiling import decode_tiled
from jaxgen.models.vae import VAE
from jaxgen.trees import shapes, size
from jaxgen.types import UserError
from tests.torch_oracle import error, nhwc, params_of, quick_jit, randomise

TOLERANCE = 1e-5
TINY = {
    "block_out_channels": [8, 16],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "latent_channels": 4,
    "sample_size": 16,
}
KINDS = {
    "Stable Diffusion": {},
    "other scale, more layers": {"scaling_factor": 0.13025, "layers_per_block": 2},
    "no quantisation": {"use_quant_conv": False, "use_post_quant_conv": False},
    "no attention, one quantisation": {
        "mid_block_add_attention": False,
        "use_quant_conv": False,
        "latent_channels": 3,
    },
}


def pair(**fields):
    """Theirs, ours, and the parameters of both."""
    theirs = randomise(AutoencoderKL(**TINY | fields))
    return theirs, VAE.read(dict(theirs.config), "vae/config.json"), params_of(theirs)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_encoder_and_decoder_match_diffusers(kind):
    theirs, vae, params = pair(**KINDS[kind])
    images = noise(2, 3, 10, 14)
    posterior = theirs.encode(images).latent_dist
    mean, std = quick_jit(vae.posterior)(params, nhwc(images))
    assert error(mean, nhwc(posterior.mean)) < TOLERANCE
    assert error(std, nhwc(posterior.std)) < TOLERANCE

    latents = noise(2, vae.config.latent_channels, 5, 7)
    expected = theirs.decode(latents / theirs.config.scaling_factor).sample
    assert error(quick_jit(vae.decode)(params, nhwc(latents)), nhwc(expected)) < TOLERANCE


@torch.no_grad()
def test_latents_are_the_scaled_mean_or_a_sample_under_the_noise_given():
    theirs, vae, params = pair()
    images = noise(1, 3, 8, 8)
    posterior = theirs.encode(images).latent_dist
    drawn = noise(*posterior.mean.shape, seed=3)
    encode = quick_jit(vae.encode)
    mode = 0.18215 * posterior.mode()
    sample = 0.18215 * (posterior.mean + posterior.std * drawn)
    assert error(encode(params, nhwc(images)), nhwc(mode)) < TOLERANCE
    assert error(encode(params, nhwc(images), nhwc(drawn)), nhwc(sample)) < TOLERANCE


@torch.no_grad()
def test_the_logarithm_of_the_variance_is_clamped_as_in_diffusers():
    theirs, vae, _ = pair()
    theirs.quant_conv.bias[4:] = torch.tensor([-90.0, 90.0, -29.0, 19.0])
    theirs.quant_conv.weight[4:] = 0
    images = noise(1, 3, 8, 8)
    std = quick_jit(vae.posterior)(params_of(theirs), nhwc(images))[1]
    expected = nhwc(theirs.encode(images).latent_dist.std)
    np.testing.assert_allclose(std, expected, rtol=TOLERANCE)
    np.testing.assert_allclose(std[0, 0, 0, :2], np.exp([-15.0, 10.0]), rtol=TOLERANCE)


@pytest.fixture(scope="module")
def tiny():
    """Theirs, our parameters and decoder, and pixels along a latent's side."""
    theirs, vae, params = pair()
    return theirs, partial(quick_jit(vae.decode), params), vae.config.factor


@torch.no_grad()
@pytest.mark.parametrize("shape", [(8, 8), (14, 20), (13, 8)], ids=str)  # edges of 2, 2 and 1
def test_tiled_decoding_matches_diffusers(shape, tiny):
    theirs, decode, factor = tiny
    theirs.enable_tiling()
    theirs.tile_latent_min_size, theirs.tile_sample_min_size = 8, 8 * factor
    latents = noise(1, 4, *shape)
    expected = theirs.tiled_decode(latents / theirs.config.scaling_factor).sample
    actual = decode_tiled(decode, jnp.asarray(nhwc(latents)), 8, factor)
    assert error(actual, nhwc(expected)) < TOLERANCE


def test_a_single_tile_is_the_whole_decode(tiny):
    _, decode, factor = tiny
    latents = jnp.asarray(nhwc(noise(1, 4, 6, 2)))
    np.testing.assert_array_equal(decode_tiled(decode, latents, 8, factor), decode(latents))


def test_the_published_config_has_the_measured_number_of_parameters():
    fields = {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
    }
    vae = VAE.read(fields, "vae/config.json")
    tree = shapes(vae.init)
    assert size(tree) == 83_653_863
    assert len(jax.tree.leaves(tree)) == 248
    assert vae.config.factor == 8


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("shift_factor", 0.1, "shift_factor = 0.1 is not supported"),
        ("latents_mean", [0.0, 0.0], "latents_mean"),
        ("act_fn", "relu", "act_fn = 'relu' is not supported (only 'silu' or 'swish' is)"),
        ("latent_chanels", 4, "unknown field 'latent_chanels' (perhaps latent_channels?)"),
        ("up_block_types", ["UpDecoderBlock2D"], "up_block_types"),
        ("down_block_types", ["AttnDownEncoderBlock2D"] * 2, "down_block_types"),
        ("block_out_channels", 8, "block_out_channels = 8 is not of type tuple[int, ...]"),
        ("norm_num_groups", 3, "3 norm_num_groups do not divide 8"),
        ("scaling_factor", 0, "scaling_factor = 0 is not above zero"),
    ],
)
def test_an_unsupported_config_is_an_error_of_one_line(field, value, words):
    with pytest.raises(UserError) as refused:
        VAE.read(TINY | {field: value}, "vae/config.json")
    assert "vae/config.json" in str(refused.value)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)

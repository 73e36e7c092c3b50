"""Tasks that learn parts of a model: the autoencoder, and CLIP against transformers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import CLIPModel

import jaxgen
from jaxgen import trees
from jaxgen.load import open_model, read_params
from jaxgen.save import save
from jaxgen.tasks import autoencoder
from jaxgen.tasks.autoencoder import Autoencoder
from jaxgen.tasks.contrastive import MEAN, STD, Contrastive
from jaxgen.types import UserError
from tests.torch_oracle import error, quick_jit

TINY = "tests/assets/tiny"
RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (4, 32, 32, 3), np.uint8)


def open_tiny(recipe):
    model, tensors = open_model(TINY)
    task = recipe.build(model)
    return task, task.init(jax.random.key(0), read_params(tensors))


def batch(**more):
    return {"place": jnp.arange(4, dtype=jnp.uint32), "image": jnp.asarray(IMAGES), **more}


def test_clip_loss_and_folder_are_those_of_transformers(tmp_path):
    task, params = open_tiny(Contrastive(model=TINY, image_size=32, patch_size=8))
    end = task.model.tokenizer.eos
    ids = RNG.integers(0, 590, (4, 77), np.int32)
    ids[np.arange(4), [5, 9, 30, 76]] = end
    loss, metrics = quick_jit(task.loss)(params, batch(ids=jnp.asarray(ids)), jax.random.key(0))

    save(task.model, params, tmp_path / "model")
    theirs = CLIPModel.from_pretrained(tmp_path / "model" / "clip").eval()
    pixels = (IMAGES / 255 - MEAN) / STD
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32)
    said = theirs(input_ids=torch.tensor(ids).long(), pixel_values=pixels, return_loss=True)
    assert error(loss, said.loss.detach()) < 1e-5
    right = (said.logits_per_image.argmax(-1) == torch.arange(4)).float().mean()
    assert float(metrics["right"]) == float(right)
    jaxgen.load(tmp_path / "model")  # and it is still a Stable Diffusion


def test_pictures_that_the_image_encoder_cannot_cut_are_refused():
    with pytest.raises(UserError, match="patch_size 7"):
        open_tiny(Contrastive(model=TINY, image_size=32, patch_size=7))


def test_the_autoencoders_loss_is_its_parts():
    task, params = open_tiny(Autoencoder(model=TINY, kl=0.5))
    assert task.learns("vae/encoder/conv_in/kernel")
    assert not task.learns("unet/conv_in/kernel")
    loss, metrics = quick_jit(task.loss)(params, batch(), jax.random.key(0))

    images = IMAGES.astype(np.float32) / 127.5 - 1
    mean, std = (np.asarray(a, np.float64) for a in task.model.vae.posterior(params["vae"], images))
    expected = torch.distributions.kl_divergence(
        torch.distributions.Normal(torch.tensor(mean), torch.tensor(std)),
        torch.distributions.Normal(0.0, 1.0),
    )
    assert error(metrics["divergence"], expected.mean()) < 1e-5
    total = metrics["error"] + 0.5 * metrics["divergence"]
    assert error(loss, total) < 1e-6


def test_the_critic_descends_while_the_copies_climb():
    """The gradient of the doubt: as it is for the critic, turned and weighed for the decoder."""
    weight = 0.25
    task, params = open_tiny(Autoencoder(model=TINY, kl=0.0, adversarial=weight))
    assert task.learns("critic/conv_0/kernel")

    def doubt(params):
        return task.loss(params, batch(), jax.random.key(0))[1]["doubt"]

    turned = trees.flatten(quick_jit(jax.grad(doubt))(params))
    kept = autoencoder.reverse
    autoencoder.reverse = lambda x, weight: x
    try:
        plain = trees.flatten(quick_jit(jax.grad(lambda p: doubt(p)))(params))
    finally:
        autoencoder.reverse = kept
    critic, decoder = "critic/conv_0/kernel", "vae/decoder/conv_out/kernel"
    assert error(turned[critic], plain[critic]) < 1e-6
    assert error(turned[decoder], -weight * plain[decoder]) < 1e-5


def test_latents_get_unit_variance_in_the_end():
    task, params = open_tiny(Autoencoder(model=TINY))
    model = task.finished(task.model, params, {"image": IMAGES})
    noise = RNG.standard_normal((4, 8, 8, 4), np.float32)
    latents = model.vae.encode(params["vae"], IMAGES.astype(np.float32) / 127.5 - 1, noise)
    assert abs(float(latents.std()) - 1) < 0.1

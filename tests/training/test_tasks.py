"""Tasks that learn parts of a model: the autoencoder, and CLIP against transformers."""

from collections import Counter
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from transformers import CLIPModel

import jaxgen
from jaxgen import trees
from jaxgen.data import transforms
from jaxgen.load import open_model, read_params
from jaxgen.models.vae import VAE
from jaxgen.save import save
from jaxgen.tasks import base
from jaxgen.tasks.autoencoder import Autoencoder
from jaxgen.tasks.contrastive import MEAN, STD, Contrastive
from jaxgen.tasks.controlnet import ControlNet
from jaxgen.tasks.denoising import Editing, Inpainting, TextToImage
from jaxgen.training import agreement, setup
from jaxgen.training.recipe import Images, Train
from jaxgen.types import UserError
from jaxgen.weights import rename
from tests.torch_oracle import error, params_of, quick_jit, randomise

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


@pytest.mark.parametrize(
    ("wanted", "share"),
    [
        (TextToImage(), 0.1),
        (Inpainting(), 0.1),
        (ControlNet(), 0.5),
        (Editing(), 0.0),  # which drops them itself, together with pictures
        (Autoencoder(), 0.0),
        (Contrastive(), 0.0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_captions_are_dropped_as_the_task_asks_unless_the_data_say_otherwise(wanted, share):
    task = wanted.build(open_model(TINY)[0])
    assert setup.data_of(Train(wanted, Images("d")), task).caption_dropout == share
    for stated in (0.0, 0.3):
        data = setup.data_of(Train(wanted, Images("d", caption_dropout=stated)), task)
        assert data.caption_dropout == stated


def test_processes_that_find_different_data_are_told(monkeypatch):
    found = {"seed": 0, "sources": [{"length": 3}]}
    agreement.check_one_order(found)  # alone
    monkeypatch.setattr(agreement.together, "other", lambda found: 2)
    with pytest.raises(UserError, match="processes 0 and 2 find different data"):
        agreement.check_one_order(found)


def small_autoencoder(**fields):
    """Theirs, a task about the same, and its parameters."""
    theirs = randomise(
        AutoencoderKL(block_out_channels=[8], norm_num_groups=4, sample_size=16), seed=1
    )
    vae = VAE.read(dict(theirs.config), "vae/config.json")
    task = Autoencoder(model=TINY, **fields).build(replace(open_model(TINY)[0], vae=vae))
    return theirs, task, {"vae": params_of(theirs)}


def their_copies(theirs, example):
    """Pictures, their reconstructions from our noise, and the posterior."""
    images = torch.tensor(IMAGES[:, :16, :16].transpose(0, 3, 1, 2) / 127.5 - 1).float()
    keys = base.example_keys(jax.random.key(0), example)
    noise = jax.vmap(lambda key: jax.random.normal(key, (16, 16, 4)))(keys)
    posterior = theirs.encode(images).latent_dist
    drawn = posterior.mean + posterior.std * torch.tensor(np.array(noise)).permute(0, 3, 1, 2)
    return images, theirs.decode(drawn).sample, posterior


def assert_gradients(actual, module):
    """Of each tensor, relative to its own size; but for what softmax makes zero."""
    actual, expected = trees.flatten(actual), {}
    for key, p in module.named_parameters():
        path, gradient = rename.to_path(key, p.ndim), p.grad.numpy()
        if path.endswith("/kernel"):
            gradient = gradient.transpose(rename.TO_FLAX[p.ndim])
        expected[path] = gradient
    assert actual.keys() == expected.keys()
    for path, gradient in expected.items():
        if not path.endswith("to_k/bias"):
            away = np.abs(actual[path] - gradient).max()
            assert away <= 1e-4 * np.abs(gradient).max(), path


def test_the_autoencoders_loss_and_gradients_are_those_of_diffusers_model():
    theirs, task, params = small_autoencoder(kl=0.5)
    assert task.learns("vae/encoder/conv_in/kernel")
    assert not task.learns("unet/conv_in/kernel")
    example = batch(image=jnp.asarray(IMAGES[:, :16, :16]))
    run = jax.value_and_grad(lambda p: task.loss(p, example, jax.random.key(0)), has_aux=True)
    (loss, metrics), slopes = quick_jit(run)(params)

    images, copies, posterior = their_copies(theirs, example)
    absolute, divergence = (copies - images).abs().mean(), posterior.kl().mean() / (16 * 16 * 4)
    expected = absolute + 0.5 * divergence
    expected.backward()
    assert error(loss, expected.detach()) < 1e-5
    assert error(metrics["error"], absolute.detach()) < 1e-5
    assert error(metrics["divergence"], divergence.detach()) < 1e-5
    assert_gradients(slopes["vae"], theirs)


class TheirCritic(torch.nn.Module):
    def __init__(self):
        super().__init__()
        for i, (before, after) in enumerate(((3, 64), (64, 128), (128, 256))):
            setattr(self, f"conv_{i}", torch.nn.Conv2d(before, after, 4, 2, 1))
        self.conv_out = torch.nn.Conv2d(256, 1, 3, 1, 1)

    def forward(self, x):
        for conv in (self.conv_0, self.conv_1, self.conv_2):
            x = torch.nn.functional.leaky_relu(conv(x), 0.2)
        return self.conv_out(x)


@pytest.mark.parametrize("sure", [0.0, -8.0], ids=["in doubt", "sure"])
def test_the_critic_and_the_copies_each_get_their_own_gradient(sure):
    """As by two losses and two backward passes (Rombach et al. 2022, their code)."""
    weight = 0.25
    theirs, task, params = small_autoencoder(kl=0.0, adversarial=weight)
    assert task.learns("critic/conv_0/kernel")
    critic = randomise(TheirCritic())
    with torch.no_grad():
        critic.conv_out.bias += sure
    params = {"vae": params["vae"], "critic": params_of(critic)}
    example = batch(image=jnp.asarray(IMAGES[:, :16, :16]))
    slopes = quick_jit(jax.grad(lambda p: task.loss(p, example, jax.random.key(0))[0]))(params)

    images, copies, _ = their_copies(theirs, example)
    ((copies - images).abs().mean() - weight * critic(copies).mean()).backward()
    critic.zero_grad()
    real, fake = critic(images), critic(copies.detach())
    (torch.relu(1 - real).mean() + torch.relu(1 + fake).mean()).backward()
    if sure:
        assert (fake < -1).all(), "where a hinge alone would tell the copies nothing"
    assert_gradients(slopes["vae"], theirs)
    assert_gradients(slopes["critic"], critic)


def test_latents_get_unit_variance_in_the_end():
    """Of all pictures of some batches, each of which has a brightness of its own."""
    task, params = open_tiny(Autoencoder(model=TINY))
    brighter = np.linspace(0, 1, 16)[:, None, None, None, None]
    pictures = (IMAGES * brighter + 255 * (1 - brighter)).astype(np.uint8)  # [16, 4, ...]
    batches = ({"image": images} for images in pictures)
    model = task.finished(task.model, params, batches, ["vae/quant_conv/bias"])
    assert next(batches, None) is None, "all 64 are needed"
    noise = RNG.standard_normal((64, 8, 8, 4), np.float32)
    images = pictures.reshape(-1, *IMAGES.shape[1:]).astype(np.float32) / 127.5 - 1
    assert abs(float(model.vae.encode(params["vae"], images, noise).std()) - 1) < 0.02


def test_latents_that_have_not_changed_keep_their_scale():
    task, params = open_tiny(Autoencoder(model=TINY, learn=("vae/decoder/",)))
    learned = [path for path in trees.flatten(params) if task.learns(path)]
    model = task.finished(task.model, params, iter([{"image": IMAGES}]), learned)
    assert model.vae.config == task.model.vae.config


def test_editing_drops_three_equal_shares():
    task = Editing(model=TINY, dropout=0.1).build(open_model(TINY)[0])
    assert task.dropout == 0, "the data would drop instructions without their pictures"
    rng, empty = np.random.default_rng(0), base.tokens_of(task.model.tokenizer, "")
    given = {"image": IMAGES[0], "original": IMAGES[1], "caption": "make it night"}
    found = Counter()
    for _ in range(4000):
        example = task.example(given, rng)
        assert example["original"] is given["original"]
        found[bool(example["seen"]), not np.array_equal(example["ids"], empty)] += 1
    shares = {kind: number / 4000 for kind, number in found.items()}
    expected = {(True, True): 0.7, (True, False): 0.1, (False, False): 0.1, (False, True): 0.1}
    assert shares.keys() == expected.keys()
    for kind, share in expected.items():  # five standard deviations
        assert abs(shares[kind] - share) < 5 * (share * (1 - share) / 4000) ** 0.5, kind


@pytest.mark.parametrize("strokes", [True, False])
def test_inpainting_draws_masks_where_the_data_have_none(strokes):
    task = Inpainting(model=TINY, strokes=strokes).build(open_model(TINY)[0])
    given = {"image": np.zeros((24, 40, 3), np.uint8), "caption": "a fox"}
    one, other = np.random.default_rng(3), np.random.default_rng(3)
    for _ in range(20):
        mask = task.example(given, one)["mask"]
        np.testing.assert_array_equal(mask, transforms.random_mask((40, 24), other, strokes))
        assert mask.shape == (24, 40)
        assert mask.any()


def test_a_model_of_zero_snr_says_so_in_its_folder(tmp_path):
    task, params = open_tiny(TextToImage(model=TINY, prediction="v_prediction", zero_snr=True))
    save(task.model, params, tmp_path / "model")
    theirs = DDIMScheduler.from_pretrained(tmp_path / "model", subfolder="scheduler")
    assert theirs.config.timestep_spacing == "trailing"
    assert theirs.config.rescale_betas_zero_snr
    assert theirs.config.prediction_type == "v_prediction"
    assert float(theirs.alphas_cumprod[-1]) < 1e-9

"""Ten steps of training against a loop of PyTorch and diffusers: same weights, data and draws."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel, compute_snr
from transformers import CLIPTextModel

from jaxgen import trees
from jaxgen.data.pipeline import Images
from jaxgen.diffusion import losses
from jaxgen.tasks import base
from jaxgen.tasks.denoising import Editing, Inpainting, TextToImage
from jaxgen.training import loop
from jaxgen.training import step as steps
from jaxgen.training.recipe import EMA, AdamW, Mesh, Train
from jaxgen.weights import rename
from tests.torch_oracle import quick_jit

TINY = Path("tests/assets/tiny")
STEPS, BATCH = 10, 4
TASKS = {
    "min-SNR of v and zero SNR": TextToImage(
        prediction="v_prediction", zero_snr=True, snr_gamma=5.0
    ),
    "min-SNR and more noise": TextToImage(snr_gamma=5.0, offset_noise=0.1, input_perturbation=0.1),
    # Not random: where all is hidden, this VAE's norms divide by next to nothing.
    "inpainting": Inpainting(masks="data"),
    "editing": Editing(),
}


@pytest.fixture(params=TASKS, ids=lambda name: name.replace(" ", "_"))
def recipe(request, tmp_path):
    task = dataclasses.replace(TASKS[request.param], model=str(TINY))
    return Train(
        task=task,
        data=Images(source=str(edits(tmp_path)), size=32, crop="random", caption_dropout=0.3),
        optimizer=AdamW(learning_rate=1e-3, epsilon=1e-4, warmup=3),
        ema=EMA(decay=0.7, warmup=True),
        batch_size=BATCH,
        steps=STEPS,
        mesh=Mesh(data=1),
        out=tmp_path / "run",
    )


def edits(folder):
    """Pictures of noise in blocks, each with the picture before."""
    from tests.training.pictures import write_folder

    return write_folder(folder / "data", count=12, columns=("original", "mask"))


def test_ten_steps_are_those_of_a_pytorch_loop(recipe):
    ours, before, after, averaged, seen = our_steps(recipe)
    theirs, expected_after, expected_averaged = their_steps(recipe, seen)

    np.testing.assert_allclose(ours, theirs, rtol=1e-4)
    assert len(after) == len(expected_after)
    for path in after:
        change, expected = after[path] - before[path], expected_after[path] - before[path]
        assert relative(change, expected) < 1e-3, path
        change, expected = averaged[path] - before[path], expected_averaged[path] - before[path]
        assert relative(change, expected) < 1e-3, path


def relative(actual, expected):
    return np.linalg.norm(actual - expected) / np.linalg.norm(expected)


def our_steps(recipe):
    """Losses, parameters before and after, their average, and what each step saw."""
    run = loop.Run(recipe)
    before = host(run.state.learned)
    step = quick(recipe, run)
    found, seen = [], []
    with run.loader():
        for n in range(STEPS):
            batch = run._next_batch()
            seen.append(draws(recipe, run, batch, n))
            run.state, metrics = step(run.state, run.frozen, batch)
            found.append(float(metrics["loss"]))
    return found, before, host(run.state.learned), host(run.state.averaged), seen


def quick(recipe, run):
    """The run's step, compiled in less time."""
    made = steps.make(
        run.task, run.transform, recipe.ema, recipe.seed, jnp.float32, recipe.accumulate
    )
    return quick_jit(made)


def host(tree):
    return {path: np.array(leaf) for path, leaf in trees.flatten(tree).items()}


def draws(recipe, run, batch, n):
    """The batch of step n and what chance brings to it, as the task draws it."""
    key = jax.random.fold_in(jax.random.key(recipe.seed), n)
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(base.example_keys(key, batch))
    shape = (32 // run.task.model.factor,) * 2 + (4,)
    noise = jax.vmap(lambda k: jax.random.normal(k, shape))(keys[:, 0])
    chance = losses.draw(keys[:, 1], shape, 1000)
    return {k: np.asarray(v) for k, v in batch.items()}, np.asarray(noise), chance


def their_steps(recipe, seen):
    """The same by diffusers' models, scheduler, weights and average, and torch's optimizer."""
    task = recipe.task
    vae = AutoencoderKL.from_pretrained(TINY, subfolder="vae")
    text_encoder = CLIPTextModel.from_pretrained(TINY, subfolder="text_encoder")
    unet = their_unet(task)
    config = DDPMScheduler.load_config(TINY, subfolder="scheduler")
    config |= {"prediction_type": task.prediction or "epsilon"}
    scheduler = DDPMScheduler.from_config(config, rescale_betas_zero_snr=bool(task.zero_snr))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, eps=1e-4, weight_decay=1e-2)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda n: min(1.0, n / 3))
    average = EMAModel(unet.parameters(), decay=0.7, use_ema_warmup=True)

    found = []
    for batch, vae_noise, chance in seen:
        images = pixels(batch["image"])
        with torch.no_grad():
            posterior = vae.encode(images).latent_dist
            latents = (posterior.mean + posterior.std * nchw(vae_noise)) * vae.config.scaling_factor
            text = text_encoder(torch.tensor(batch["ids"]).long())[0]
            more = concat(task, batch, images, vae)
        time = torch.tensor(np.asarray(chance.time)).long()
        noise = nchw(chance.noise) + task.offset_noise * nchw(chance.offset)
        heard = noise + task.input_perturbation * nchw(chance.perturbation)
        noisy = scheduler.add_noise(latents, heard, time)
        prediction = unet(torch.cat([noisy, *more], 1), time, text).sample
        target = noise
        if task.prediction == "v_prediction":
            target = scheduler.get_velocity(latents, noise, time)
        error = ((prediction - target) ** 2).mean((1, 2, 3))
        if task.snr_gamma:
            snr = compute_snr(scheduler, time)
            weight = torch.minimum(snr, torch.full_like(snr, task.snr_gamma))
            error = error * weight / (snr + 1 if task.prediction == "v_prediction" else snr)
        loss = error.mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        warmup.step()
        average.step(unet.parameters())
        found.append(loss.item())

    after = named(unet)
    average.copy_to(unet.parameters())
    return found, after, named(unet)


def their_unet(task):
    """The tiny UNet, with further input channels of zero weight where the task has them."""
    unet = UNet2DConditionModel.from_pretrained(TINY, subfolder="unet")
    channels = {Inpainting: 9, Editing: 8}.get(type(task), 4)
    if channels == 4:
        return unet
    wider = UNet2DConditionModel.from_config({**unet.config, "in_channels": channels})
    state = unet.state_dict()
    kernel = torch.zeros(wider.conv_in.weight.shape)
    kernel[:, :4] = state["conv_in.weight"]
    wider.load_state_dict(state | {"conv_in.weight": kernel})
    return wider


def concat(task, batch, images, vae):
    """What the UNet reads beside the noisy latents, by methods.md's words."""
    if isinstance(task, Inpainting):
        mask = torch.tensor(batch["mask"])[:, None].float()
        hidden = vae.encode(images * (mask < 0.5)).latent_dist.mode() * vae.config.scaling_factor
        small = torch.nn.functional.interpolate(mask, size=hidden.shape[2:])
        return [small, hidden]
    if isinstance(task, Editing):
        seen = torch.tensor(batch["seen"])[:, None, None, None]
        return [seen * vae.encode(pixels(batch["original"])).latent_dist.mode()]
    return []


def pixels(images):
    return nchw(images.astype(np.float32) / 127.5 - 1)


def nchw(x):
    return torch.tensor(np.asarray(x)).permute(0, 3, 1, 2)


def named(unet):
    """Parameters under our paths, in our layout."""
    found = {}
    for key, value in unet.state_dict().items():
        path, array = rename.to_path(key, value.ndim), value.detach().numpy()
        if path.endswith("/kernel"):
            array = array.transpose(rename.TO_FLAX[array.ndim])
        found[f"unet/{path}"] = np.array(array)
    return found


def test_a_batch_in_parts_gives_the_same_step(tmp_path):
    data = Images(source=str(edits(tmp_path)), size=32)
    recipe = Train(
        TextToImage(model=str(TINY)),
        data,
        batch_size=8,
        steps=2,
        mesh=Mesh(data=2),
        out=tmp_path / "a",
    )
    whole = our_steps_of(recipe)
    parts = our_steps_of(dataclasses.replace(recipe, accumulate=4, out=tmp_path / "b"))
    np.testing.assert_allclose(parts, whole, rtol=1e-5)


def our_steps_of(recipe):
    run = loop.Run(recipe)
    step = quick(recipe, run)
    with run.loader():
        for _ in range(recipe.steps):
            run.state, metrics = step(run.state, run.frozen, run._next_batch())
    moved = jnp.concatenate([x.ravel() for x in jax.tree.leaves(run.state.learned)])
    return [float(metrics["loss"]), float(metrics["grad_norm"]), float(jnp.abs(moved).sum())]

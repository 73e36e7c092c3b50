"""Learning to denoise: text to image, inpainting, and editing by instruction.

One loss serves them: they differ in what the UNet reads beside the noisy latents.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import denoiser
from jaxgen.conditioning import unit
from jaxgen.data import transforms
from jaxgen.denoiser import Model
from jaxgen.diffusion import losses
from jaxgen.diffusion.losses import Objective
from jaxgen.load import pipeline_of
from jaxgen.plan import read_schedule
from jaxgen.tasks import base
from jaxgen.tasks.base import Batch, Example, Metrics, Task
from jaxgen.types import Array, Inputs, Params, UserError

Further = Callable[[Params, Batch], dict[str, Any]]  # fields of `Inputs` beside the text

DROPOUT = 0.1  # of captions, as in Stable Diffusion's own training


@dataclass(frozen=True)
class TextToImage:
    """Learn to draw from captions (Rombach et al. 2022)."""

    model: str = "fresh:sd15"
    """What to start from: a folder, a hub id, a single file, or fresh:NAME."""
    fresh: tuple[str, ...] = ()
    """Parts that start from random parameters instead: unet, text_encoder, vae."""
    learn: tuple[str, ...] = ("unet/",)
    """Patterns (regular expressions from the start) of the parameter paths that learn."""
    prediction: str | None = None
    """epsilon, v_prediction or sample; by default the model's own."""
    zero_snr: bool | None = None
    """Whether the last step is pure noise (Lin et al. 2023); by default the model's own."""
    snr_gamma: float | None = None
    """Min-SNR weights (Hang et al. 2023), 5 in the paper; none by default."""
    offset_noise: float = 0.0
    """Share of noise that is one number for a whole channel; 0.1 where it is used."""
    input_perturbation: float = 0.0
    """Noise in the input that the target does not tell of (Ning et al. 2023); 0.1 in the paper."""

    def build(self, model: Model) -> Task:
        """The task on a model of this kind. UserError if it is of another."""
        if model.unet.config.in_channels != model.vae.config.latent_channels:
            raise UserError(f"{model.name} reads pictures; text_to_image needs a UNet without")
        model = scheduled(self, model)
        tokens = partial(captioned, model=model)
        return task_of(self, model, lambda params, batch: {}, tokens)._replace(
            cached=True, dropout=DROPOUT
        )


@dataclass(frozen=True)
class Inpainting(TextToImage):
    """Learn to fill what a mask hides, with a UNet of 9 channels.

    From a text-to-image model, whose UNet gets five more channels that begin at zero. Masks are the
    data's own, or random: rectangles, ellipses and strokes, and everything in one of four.
    """

    masks: str = "random"
    """random, or data: a column `mask` of picture files, white where to repaint."""
    strokes: bool = True
    """Whether random masks are freehand lines as often as rectangles and ellipses."""

    def build(self, model: Model) -> Task:
        """The task on a model for text to image, or for inpainting."""
        if self.masks not in ("random", "data"):
            raise UserError(f"masks = {self.masks!r} is neither random nor data")
        latent = model.vae.config.latent_channels
        model = _widened(scheduled(self, model), 2 * latent + 1)
        example = partial(_masked, model=model, strokes=self.strokes)
        columns = ("mask",) if self.masks == "data" else ()
        task = task_of(self, model, partial(_mask_and_picture, model), example)
        return task._replace(columns=columns, dropout=DROPOUT)


@dataclass(frozen=True)
class Editing(TextToImage):
    """Learn to edit by instruction, with a UNet of 8 channels (Brooks et al. 2023).

    The picture is what the edit leads to, the caption the instruction, and the column `original`
    the picture before.
    """

    dropout: float = 0.05
    """Share of examples without the picture, as many without the instruction, and without both."""

    def build(self, model: Model) -> Task:
        """The task on a model for text to image, or for editing."""
        if not 0 <= self.dropout <= 1 / 3:
            raise UserError(f"dropout = {self.dropout} is not within 0 to 1/3")
        model = _widened(scheduled(self, model), 2 * model.vae.config.latent_channels)
        example = partial(_edited, model=model, dropout=self.dropout)
        task = task_of(self, model, partial(_original, model), example)
        return task._replace(columns=("original",))


def scheduled(recipe: TextToImage, model: Model) -> Model:
    """The model with the noise schedule that it is to learn."""
    scheduler = dict(model.scheduler)
    if recipe.prediction:
        scheduler["prediction_type"] = recipe.prediction
    if recipe.zero_snr is not None:
        scheduler["rescale_betas_zero_snr"] = recipe.zero_snr
        if recipe.zero_snr:  # the only grid that begins where the noise is pure; PNDM has none
            scheduler["timestep_spacing"] = "trailing"
            if scheduler["_class_name"] == "PNDMScheduler":
                scheduler["_class_name"] = "DDIMScheduler"
                scheduler.pop("skip_prk_steps", None)
    return replace(model, scheduler=scheduler)


def _widened(model: Model, channels: int) -> Model:
    """The model with a UNet of so many input channels."""
    found, plain = model.unet.config.in_channels, model.vae.config.latent_channels
    if found not in (plain, channels):
        raise UserError(
            f"{model.name} has {found} input channels; {plain} or {channels} are wanted"
        )
    unet = replace(model.unet, config=replace(model.unet.config, in_channels=channels))
    return replace(model, unet=unet, pipeline=pipeline_of(unet))


def task_of(
    recipe: TextToImage,
    model: Model,
    further: Further,
    example: Callable[[Example, np.random.Generator], Example],
) -> Task:
    """A task of denoising.

    Args:
        further: what the UNet and its branches read beside the text.
        example: what the task reads of an example of the data.
    """
    schedule = read_schedule(model, None)
    objective = Objective(
        schedule, recipe.snr_gamma, recipe.offset_noise, recipe.input_perturbation
    )

    def init(key: Array, given: Params) -> Params:
        kernel = given["unet"]["conv_in"]["kernel"]
        more = model.unet.config.in_channels - kernel.shape[2]
        kernel = jnp.pad(kernel, ((0, 0), (0, 0), (0, more), (0, 0)))
        conv_in = {**given["unet"]["conv_in"], "kernel": kernel}
        return {**given, "unet": {**given["unet"], "conv_in": conv_in}}

    loss = partial(denoising_loss, model, objective, further)
    return Task(model, init, base.by_patterns(recipe.learn), loss, example)


def denoising_loss(
    model: Model, objective: Objective, further: Further, params: Params, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """Noises a batch's latents, asks the UNet, weighs the error."""
    keys = jax.vmap(lambda k: jax.random.split(k, 2))(base.example_keys(key, batch))
    latents = base.latents_of(model, params, batch, keys[:, 0])
    chance = losses.draw(keys[:, 1], latents.shape[1:], objective.schedule.num_train_timesteps)
    question = losses.ask(objective, latents, chance)

    inputs = Inputs(base.text_of(model, params, batch), **further(params, batch))
    denoise = denoiser.bind(model.network, params, denoiser.prepare(model.network, params, inputs))
    prediction = denoise(question.x, losses.point(question.time))
    return losses.loss(prediction, question), {}


def captioned(example: Example, rng: np.random.Generator, *, model: Model) -> Example:
    """What text to image reads of an example: its picture, or what is cached of it, and tokens."""
    kept: Example = {k: example[k] for k in ("image", "mean", "std", "embeddings") if k in example}
    cached = "embeddings" in kept
    return kept if cached else kept | {"ids": base.tokens_of(model.tokenizer, example["caption"])}


def _masked(example: Example, rng: np.random.Generator, *, model: Model, strokes: bool) -> Example:
    mask = example.get("mask")
    if mask is None:
        mask = transforms.random_mask(example["image"].shape[1::-1], rng, strokes)
    elif mask.ndim == 3:
        mask = mask.mean(-1) >= 128
    return captioned(example, rng, model=model) | {"mask": np.asarray(mask, bool)}


def _mask_and_picture(model: Model, params: Params, batch: Batch) -> dict[str, Any]:
    """Mask and latents of what it leaves, [B, h, w, 1 + C]; the hidden is grey."""
    mask = batch["mask"][..., None]
    latents = model.vae.encode(params["vae"], unit(batch["image"]) * ~mask)
    f = model.factor
    channels = jnp.concatenate([mask[:, ::f, ::f].astype(latents.dtype), latents], -1)
    return {"concat": (channels,)}


def _edited(example: Example, rng: np.random.Generator, *, model: Model, dropout: float) -> Example:
    """Drops the caption from one share of size `dropout`, both from a second, and from a third the
    picture before the edit.

    So that neither, and each of the two alone, is learned (Brooks et al. 2023, section 3.2.1).
    """
    chance = rng.uniform()
    if chance < 2 * dropout:
        example = {**example, "caption": ""}
    seen = not dropout <= chance < 3 * dropout
    original = {"original": example["original"], "seen": np.float32(seen)}
    return captioned(example, rng, model=model) | original


def _original(model: Model, params: Params, batch: Batch) -> dict[str, Any]:
    """Unscaled latents of the picture before the edit, [B, h, w, C]; zero where it is not seen."""
    mean, _ = model.vae.posterior(params["vae"], unit(batch["original"]))
    return {"concat": (batch["seen"][:, None, None, None] * mean,)}

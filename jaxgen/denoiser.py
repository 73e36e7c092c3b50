"""Where a model's parts and branches meet: a UNet closed over its conditioning is a function."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.diffusion.guidance import SLACK
from jaxgen.models.clip import TextEncoder
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.models.controlnet import ControlNet
from jaxgen.models.unet import UNet
from jaxgen.models.vae import VAE
from jaxgen.types import Array, Cache, Control, Denoiser, Inputs, Params, Point, Residuals

CONTROLLED = {  # diffusers' pipelines with ControlNets, by what each is without
    "StableDiffusionPipeline": "StableDiffusionControlNetPipeline",
    "StableDiffusionImg2ImgPipeline": "StableDiffusionControlNetImg2ImgPipeline",
    "StableDiffusionInpaintPipeline": "StableDiffusionControlNetInpaintPipeline",
}


@dataclass(frozen=True)
class Network:
    """What denoises: the UNet and its branches. A program is compiled for each value of it."""

    unet: UNet
    controls: tuple[ControlNet, ...] = ()


@dataclass(frozen=True, eq=False)
class Model:
    """The parts of a Stable Diffusion; their parameters travel beside it, in a tree by part."""

    unet: UNet
    vae: VAE
    text_encoder: TextEncoder
    tokenizer: Tokenizer
    scheduler: Mapping[str, Any]  # the object in scheduler_config.json, as it was read
    name: str  # what it was loaded from, for records
    pipeline: str = "StableDiffusionPipeline"  # `_class_name` of model_index.json
    vision: VisionEncoder | None = None  # with a parameter tree `clip`: what CLIP has beside text
    controls: tuple[ControlNet, ...] = ()  # with parameter trees as `control_names` calls them

    @property
    def factor(self) -> int:
        """Pixels along a latent's side: 8 for Stable Diffusion."""
        return self.vae.config.factor

    @property
    def distilled(self) -> bool:
        """Whether the UNet reads the scale of guidance, as latent consistency models do."""
        return bool(self.unet.config.time_cond_proj_dim)

    @property
    def network(self) -> Network:
        """What denoises."""
        return Network(self.unet, self.controls)


def control_names(count: int) -> tuple[str, ...]:
    """Parts of a model that are ControlNets, as diffusers names their folders."""
    return tuple("controlnet" + f"_{i}" * bool(i) for i in range(count))


def prepare(network: Network, params: Params, inputs: Inputs) -> Cache:
    """All that the denoiser computes once per image, because it does not depend on time."""
    cache: Cache = {
        "unet": network.unet.prepare(params["unet"], inputs),
        "controls": inputs.controls,
    }
    for name, part, control in _controls(network, inputs.controls):
        cache[name] = part.prepare(params[name], _seen(inputs, control), control.hint)
    return cache


def bind(network: Network, params: Params, cache: Cache) -> Denoiser:
    """Closes the UNet over what `prepare` made: (noisy x [B, h, w, C], point) -> raw prediction.

    It has as many rows as what was prepared: B, or under guidance those of each image's conditions.
    """

    def denoise(x: Array, point: Point) -> Array:
        x = point.scale * x
        residuals = [
            _residuals(part, params[name], x, point, cache[name], control)
            for name, part, control in _controls(network, cache["controls"])
        ]
        return network.unet.apply(params["unet"], x, point, cache["unet"], residuals)

    return denoise


def _controls(
    network: Network, controls: tuple[Control, ...]
) -> list[tuple[str, ControlNet, Control]]:
    names = control_names(len(network.controls))
    return list(zip(names, network.controls, controls, strict=True))


def _seen(inputs: Inputs, control: Control) -> Inputs:
    """What conditions a ControlNet: all of it, or of each image the last condition alone."""
    for text in control.texts:
        images, count = text.shape[:2]
        added = (y.reshape(images, count, *y.shape[1:])[:, -1] for y in inputs.added)
        return inputs._replace(text=text[:, -1], added=tuple(added))
    return inputs


def _residuals(
    part: ControlNet, params: Params, x: Array, point: Point, cache: Cache, control: Control
) -> Residuals:
    """Residuals of one ControlNet, weighted; outside of its span it does not run."""

    def acting() -> Residuals:
        found = part.apply(params, x, point, cache)
        for text in control.texts:
            found = jax.tree.map(partial(_last, count=text.shape[1]), found)
        *skips, middle = control.weights
        weighted = tuple(w * y for w, y in zip(skips, found.skips))
        return Residuals(middle * found.middle, weighted)

    if not control.span:
        return acting()
    low, high = control.span
    # diffusers keeps step i where i / N >= low and (i + 1) / N <= high.
    acts = (point.index >= low * point.steps - SLACK) & (
        point.index + 1 <= high * point.steps + SLACK
    )

    def nothing() -> Residuals:
        return jax.tree.map(lambda y: jnp.zeros(y.shape, y.dtype), jax.eval_shape(acting))

    return jax.lax.cond(acts, acting, nothing)


def _last(y: Array, count: int) -> Array:
    """[images, ...] -> [images * count, ...]: each as the last of its image's, the others zero."""
    before = jnp.zeros((len(y), count - 1, *y.shape[1:]), y.dtype)
    return jnp.concatenate([before, y[:, None]], 1).reshape(-1, *y.shape[1:])

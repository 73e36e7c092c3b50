"""Where a model's parts and branches meet: a UNet closed over its conditioning is a function."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxgen.data.tokenizer import Tokenizer
from jaxgen.models.clip import TextEncoder, VisionEncoder
from jaxgen.models.unet import UNet
from jaxgen.models.vae import VAE
from jaxgen.types import Array, Cache, Denoiser, Inputs, Params, Point


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

    @property
    def factor(self) -> int:
        """Pixels along a latent's side: 8 for Stable Diffusion."""
        return self.vae.config.factor


def prepare(unet: UNet, params: Params, inputs: Inputs) -> Cache:
    """All that the denoiser computes once per image, because it does not depend on time."""
    return {"unet": unet.prepare(params["unet"], inputs)}


def bind(unet: UNet, params: Params, cache: Cache) -> Denoiser:
    """Closes the UNet over what `prepare` made: (noisy x [B, h, w, C], point) -> raw prediction."""

    def denoise(x: Array, point: Point) -> Array:
        return unet.apply(params["unet"], point.scale * x, point, cache["unet"])

    return denoise

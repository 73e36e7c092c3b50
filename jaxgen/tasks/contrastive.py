"""Learning CLIP: pictures and captions in one space."""

from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.denoiser import Model
from jaxgen.models.clip_config import VisionConfig
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.models.layers import linear
from jaxgen.tasks import base
from jaxgen.tasks.base import Batch, Example, Metrics, Task
from jaxgen.types import Array, Params, UserError, full_precision

MEAN = (0.48145466, 0.4578275, 0.40821073)  # of CLIP's training pictures, by channel
STD = (0.26862954, 0.26130258, 0.27577711)
LARGEST = np.log(100.0)  # of the logarithm of the scale, as in the paper


@dataclass(frozen=True)
class Contrastive:
    """Learn which caption belongs to which picture of a batch (Radford et al. 2021, figure 3).

    The model's text encoder learns with an image encoder of its width and depth. Negatives are the
    other examples of the batch, or of its part where it is accumulated. The model folder has a
    folder `clip` in the end, which transformers' CLIPModel loads.
    """

    model: str = "fresh:mini"
    """What to start from: a folder, a hub id, a single file, or fresh:NAME."""
    fresh: tuple[str, ...] = ()
    """Parts that start from random parameters instead: text_encoder."""
    learn: tuple[str, ...] = ("text_encoder/", "clip/")
    """Patterns of the parameter paths that learn."""
    image_size: int = 64
    """Side of the pictures that the image encoder reads; also of the data."""
    patch_size: int = 8
    """Side of its patches."""

    def build(self, model: Model) -> Task:
        """The task on any model."""
        text = model.text_encoder.config
        if self.patch_size < 1 or self.image_size % self.patch_size:
            raise UserError(
                f"image_size {self.image_size} is not divisible by patch_size {self.patch_size}"
            )
        vision = VisionEncoder(
            VisionConfig(
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_hidden_layers=text.num_hidden_layers,
                num_attention_heads=text.num_attention_heads,
                hidden_act=text.hidden_act,
                projection_dim=text.projection_dim,
                image_size=self.image_size,
                patch_size=self.patch_size,
            ),
            remat=model.text_encoder.remat,
        )

        def init(key: Array, given: Params) -> Params:
            one, two = jax.random.split(key)
            shape = (text.hidden_size, text.projection_dim)
            projection = jax.random.normal(two, shape) * text.hidden_size**-0.5
            clip = {
                **vision.init(one),
                "text_projection": {"kernel": projection},
                "logit_scale": jnp.log(jnp.float32(1 / 0.07)),
            }
            return {**given, "clip": clip}

        example = partial(_pair, model=model)
        model = replace(model, vision=vision)
        loss = partial(contrastive_loss, model, vision)
        return Task(model, init, base.by_patterns(self.learn), loss, example)


@full_precision
def contrastive_loss(
    model: Model, vision: VisionEncoder, params: Params, batch: Batch, key: Array
) -> tuple[Array, Metrics]:
    """The mean cross entropy of finding the caption of a picture, and the picture of a caption."""
    clip = params["clip"]
    _, seen = vision.apply(clip, pixels_of(batch["image"]))
    _, pooled = model.text_encoder.apply(params["text_encoder"], batch["ids"])
    said = linear(clip["text_projection"], pooled)

    seen, said = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (seen, said))
    scale = jnp.exp(jnp.minimum(clip["logit_scale"], LARGEST))
    scores = scale * seen @ said.T
    found = [jnp.diag(jax.nn.log_softmax(s)) for s in (scores, scores.T)]
    right = (scores.argmax(-1) == jnp.arange(len(scores))).mean()
    return -(found[0] + found[1]).mean() / 2, {"right": right, "scale": scale}


def pixels_of(images: Array) -> Array:
    """uint8 [B, H, W, 3] -> float32, as CLIP's image encoder reads them."""
    return (images / jnp.float32(255) - jnp.asarray(MEAN)) / jnp.asarray(STD)


def _pair(example: Example, rng: np.random.Generator, *, model: Model) -> Example:
    return {"image": example["image"], "ids": base.tokens_of(model.tokenizer, example["caption"])}

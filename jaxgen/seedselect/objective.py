"""What a seed is judged by: the meaning of its image, its appearance, and its norm.

The meaning is the distance to a centroid in the space of a CLIP, or any differentiable score of an
image that takes its place; the appearance is the distance to a centroid of latents (Samuel et al.
2024, "Generating images of rare concepts", section 4).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp

from jaxgen.diffusion import shell
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.seedselect.slopes import with_slopes
from jaxgen.tasks.contrastive import MEAN, STD
from jaxgen.types import Array, Params

Distance = Literal["cosine", "euclidean"]
# Images that are decoded from the latents of the last steps, and what each counts: as published.
TAIL = (0.05, 0.25, 0.70)
TEMPERATURE = 0.1


class Score(NamedTuple):
    """What stands for the meaning of an image; lower is better.

    Any differentiable function will do: an aesthetic model, a classifier, LPIPS. For example, for
    bright pictures, `Score(lambda params, rows, images: -images.mean((1, 2, 3)))`.

    Attributes:
        apply: (params, rows, images float [B, H, W, 3] about [-1, 1]) -> [B]. One program is
            compiled for each value of it, so make it once.
        params: a network's parameters, or nothing.
        rows: what each image is compared with: a tree whose leaves have an axis of all images,
            [prompts x count], of which `apply` gets its batch's rows; or nothing.
    """

    apply: Callable[[Any, Any, Array], Array]
    params: Any = ()
    rows: Any = ()


class Targets(NamedTuple):
    """What each of B images should mean, in the space of a CLIP."""

    centroid: Array  # [B, P] mean of the references' embeddings, of norm 1 for cosines
    others: Array  # [B, M, P] those of other classes, M >= 0


@dataclass(frozen=True)
class ClipDistance:
    """Distance of an image to its centroid, and how near it is among other classes' centroids.

    Attributes:
        vision: the image encoder.
        distance: "cosine", 1 - cos to the normed centroid, as in the released code; "euclidean" to
            the centroid of embeddings, as in the paper, over the root of their width.
        contrast: weight of the cross entropy of telling the centroid from the others.
    """

    vision: VisionEncoder
    distance: Distance = "cosine"
    contrast: float = 0.0

    def __call__(self, params: Params, rows: Targets, images: Array) -> Array:
        """Images [B, H, W, 3] about [-1, 1] -> [B]."""
        seen = self.embed(params, images)
        own = self.between(seen, rows.centroid)
        if not self.contrast:
            return own
        others = self.between(seen[:, None], rows.others)
        scores = -jnp.concatenate([own[:, None], others], -1) / TEMPERATURE
        return own - self.contrast * jax.nn.log_softmax(scores)[:, 0]

    def embed(self, params: Params, images: Array) -> Array:
        """Images [B, H, W, 3] about [-1, 1] -> [B, P], of norm 1 for cosines."""
        seen = self.vision.apply(params, for_clip(images, self.vision.config.image_size))[1]
        return unit(seen) if self.distance == "cosine" else seen

    def between(self, one: Array, two: Array) -> Array:
        """Distance of vectors [..., P] -> [...]."""
        if self.distance == "cosine":
            return 1 - (one * two).sum(-1)
        return root_mean(((one - two) ** 2).mean(-1))

    def centroid(self, embeddings: Array) -> Array:
        """[K, P] of one class -> [P]."""
        mean = embeddings.mean(0)
        return unit(mean) if self.distance == "cosine" else mean


def for_clip(images: Array, side: int) -> Array:
    """[B, H, W, 3] about [-1, 1] -> the middle square at CLIP's size and scale, by bicubic."""
    _, height, width, channels = images.shape
    short = min(height, width)
    top, left = (height - short) // 2, (width - short) // 2
    square = images[:, top : top + short, left : left + short]
    if short != side:
        shape = (len(images), side, side, channels)
        square = jax.image.resize(square, shape, "cubic", antialias=True)
    mean, std = (jnp.asarray(n, images.dtype) for n in (MEAN, STD))
    return (jnp.clip(square / 2 + 0.5, 0, 1) - mean) / std


def unit(x: Array) -> Array:
    """Vectors [..., P] of norm 1."""
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


def root_mean(square: Array) -> Array:
    """Mean squares [...] -> Euclidean distances over the root of the number of dimensions.

    So weights and the temperature, which are the released code's and of cosines, are of a size that
    fits, whatever the dimensions: the paper's own weight is not known.
    """
    return jnp.sqrt(square + 1e-12)  # 0 has a gradient, too


class Look(NamedTuple):
    """What is seen of B seeds; [B] each."""

    loss: Array
    meaning: Array  # the score of the images, weighed as the tail says
    appearance: Array  # distance to the mean of the references' latents
    norm: Array  # of the seed, over sqrt(d), which is about what noise has


@dataclass(frozen=True)
class Objective:
    """What is minimised, static; a program is compiled for each value of it.

    Attributes:
        score: of a `Score`.
        distance: of latents: the mean square, as in the released code ("cosine"), or its root, the
            Euclidean over the root of their size.
        tail: weights of the images decoded after the last steps, the finished one last.
    """

    score: Callable[[Any, Any, Array], Array]
    distance: Distance = "cosine"
    tail: tuple[float, ...] = TAIL

    def __call__(
        self,
        seeds: Array,
        latents: Array,
        decode: Callable[[Params, Array], Array],
        decoder: Params,
        weights: "Weights",
        given: "Given",
    ) -> Look:
        """What B seeds [B, h, w, C] cost, from the latents [k, B, h, w, C] of their last steps.

        Images are decoded and scored one step after the other, with the slopes of each at once.
        """

        @with_slopes
        def scored(x: Array, held: tuple[Params, Given]) -> Array:
            decoder, given = held
            return self.score(given.params, given.rows, decode(decoder, x))

        scores = jax.lax.map(lambda x: scored(x, (decoder, given)), latents)
        meaning = jnp.einsum("k,kb->b", jnp.asarray(self.tail, scores.dtype), scores)
        square = ((latents[-1] - given.appearance) ** 2).mean((1, 2, 3))
        appearance = square if self.distance == "cosine" else root_mean(square)
        loss = weights.meaning * meaning + (1 - weights.meaning) * appearance
        norm = jnp.linalg.norm(seeds.reshape(len(seeds), -1), axis=-1)
        size = seeds[0].size
        loss = loss - weights.norm * shell.log_prior(norm, size)
        parts = meaning, appearance, norm / math.sqrt(size)
        return Look(loss, *(part.astype(loss.dtype) for part in parts))


class Weights(NamedTuple):
    """What counts how much; traced."""

    meaning: Array | float  # lambda; the appearance counts 1 - lambda
    norm: Array | float  # of the log prior of the seed's norm


class Given(NamedTuple):
    """What seeds are compared with; traced."""

    params: Any  # of the score
    rows: Any  # of the score, an axis [B] each
    appearance: Array  # [B, h, w, C] mean of the references' latents

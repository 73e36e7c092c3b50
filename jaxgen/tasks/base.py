"""What a task is, and what all that denoise have in common."""

import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen.conditioning import encode_text
from jaxgen.denoiser import Model
from jaxgen.types import Array, Params, UserError

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Example = dict[str, Any]


class Task(NamedTuple):
    """Three functions, and what they are about.

    Every example of a batch has a number, `place`, in the order of training: whatever chance brings
    to it is drawn from that number and the step's key, so that no layout of devices matters.
    """

    model: Model  # what learns: it is sampled on the way and saved in the end
    init: Callable[[Array, Params], Params]  # key, pretrained trees -> every parameter
    learns: Callable[[str], bool]  # parameter path -> does it get gradients?
    loss: Callable[[Params, Batch, Array], tuple[Array, Metrics]]  # parameters, batch, key
    example: Callable[[Example, np.random.Generator], Example]  # on the host, before batches
    columns: tuple[str, ...] = ()  # of the data, beside image and caption
    # What is saved, once it has learned; reads a last batch. A VAE's latents get their scale here.
    finished: Callable[[Model, Params, Example], Model] = lambda model, params, batch: model


def by_patterns(patterns: tuple[str, ...]) -> Callable[[str], bool]:
    """Whether a path begins with one of the patterns. UserError for what is no pattern."""
    try:
        compiled = [re.compile(pattern) for pattern in patterns]
    except re.error as error:
        raise UserError(f"learn: {error.pattern!r} is no regular expression: {error}") from None
    return lambda path: any(pattern.match(path) for pattern in compiled)


def example_keys(key: Array, batch: Batch) -> Array:
    """A key for each example [B], by its place."""
    return jax.vmap(lambda place: jax.random.fold_in(key, place))(batch["place"])


def unit(images: Array) -> Array:
    """uint8 [B, H, W, 3] -> float32 in [-1, 1]."""
    return images.astype(jnp.float32) / 255 * 2 - 1


def latents_of(model: Model, params: Params, batch: Batch, keys: Array) -> Array:
    """Latents [B, h, w, C] of a batch's pictures: drawn from the posterior, as in released models.

    A cached example holds the posterior itself, `mean` and `std`, instead of its picture.
    """
    if "mean" in batch:
        mean, std = batch["mean"], batch["std"]
    else:
        mean, std = model.vae.posterior(params["vae"], unit(batch["image"]))
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return model.vae.config.scaling_factor * (mean + std * noise)


def text_of(model: Model, params: Params, batch: Batch) -> Array:
    """Embeddings [B, T, D] of a batch's captions; a cached example holds them as `embeddings`."""
    if "embeddings" in batch:
        return batch["embeddings"].astype(jnp.float32)
    ids = batch["ids"][:, None]
    return encode_text(params["text_encoder"], ids, jnp.ones(ids.shape), encoder=model.text_encoder)


def tokens_of(model: Model, caption: str) -> np.ndarray:
    """A caption as int32 [T]: cut after 75 tokens, parentheses literal."""
    tokenizer = model.tokenizer
    tokens = tokenizer.encode(caption)[: tokenizer.length - 2]
    ids = np.full(tokenizer.length, tokenizer.pad, np.int32)
    ids[: len(tokens) + 2] = [tokenizer.bos, *tokens, tokenizer.eos]
    return ids

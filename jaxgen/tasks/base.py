"""What a task is, and what all that denoise have in common."""

import re
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import trees
from jaxgen.conditioning import unit
from jaxgen.data.pipeline import Images
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.denoiser import Model
from jaxgen.types import Array, Params, UserError
from jaxgen.weights.files import Tensors

Batch = Mapping[str, Array]
Metrics = dict[str, Array]
Example = dict[str, Any]
Finished = Callable[[Model, Params, Iterator[Example], Collection[str]], Model]

# What a cache holds is made by these parameters: of the VAE, what decodes may be another.
ENCODERS = {"vae": ("vae/encoder/", "vae/quant_conv/"), "text_encoder": ("text_encoder/",)}


class Task(NamedTuple):
    """What to learn: three functions, the model they are about, and what they ask of the data.

    Every example of a batch has a number, `place`, in the order of training: whatever chance brings
    to it is drawn from that number and the step's key, so that no layout of devices matters.
    """

    model: Model  # what learns: it is sampled on the way and saved in the end
    init: Callable[[Array, Params], Params]  # key, pretrained trees -> every parameter
    learns: Callable[[str], bool]  # parameter path -> does it get gradients?
    loss: Callable[[Params, Batch, Array], tuple[Array, Metrics]]  # parameters, batch, key
    example: Callable[[Example, np.random.Generator], Example]  # on the host, before batches
    columns: tuple[str, ...] = ()  # of the data, beside image and caption
    # What is saved, once these paths have learned; may read the last batch, and what would come
    # after it. Latents are scaled here.
    finished: Finished = lambda model, params, batches, learned: model
    dropout: float = 0.0  # of captions, by the data, unless these say another share
    cached: bool = False  # whether it learns from what `jaxgen cache` stored as from pictures


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


def posterior_of(model: Model, params: Params, batch: Batch) -> tuple[Array, Array]:
    """Mean and standard deviation [B, h, w, C] of the latents of a batch's pictures, unscaled.

    A cached example holds them, `mean` and `std`, instead of its picture.
    """
    if "mean" in batch:
        return batch["mean"].astype(jnp.float32), batch["std"].astype(jnp.float32)
    return model.vae.posterior(params["vae"], unit(batch["image"]))


def latents_of(model: Model, params: Params, batch: Batch, keys: Array) -> Array:
    """Latents [B, h, w, C] of a batch: drawn from the posterior, as released models learned."""
    mean, std = posterior_of(model, params, batch)
    noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:]))(keys)
    return model.vae.config.scaling_factor * (mean + std * noise)


def text_of(model: Model, params: Params, batch: Batch) -> Array:
    """Embeddings [B, T, D] of a batch's captions; a cached example holds them as `embeddings`."""
    if "embeddings" in batch:
        return batch["embeddings"].astype(jnp.float32)
    return model.text_encoder.apply(params["text_encoder"], batch["ids"])[0]


def tokens_of(tokenizer: Tokenizer, caption: str) -> np.ndarray:
    """A caption as int32 [T]: cut where the tokenizer's length ends, parentheses literal."""
    tokens = tokenizer.encode(caption)[: tokenizer.length - 2]
    ids = np.full(tokenizer.length, tokenizer.pad, np.int32)
    ids[: len(tokens) + 2] = [tokenizer.bos, *tokens, tokenizer.eos]
    return ids


def check_caches(task: Task, tensors: Mapping[str, Tensors], data: Images) -> None:
    """UserError unless the caches among the sources hold what the task would compute itself.

    Args:
        tensors: what the task starts from, by part and path; of encoders the values are read.
    """
    for ref, held in data.caches().items():
        if not task.cached:
            raise UserError(f"{ref} is a cache, and the task reads pictures; name their folder")
        for part, path in learned(task, tensors).items():
            made = getattr(held, part)
            if not made:  # it holds nothing of this part
                continue
            if path:
                raise UserError(f"{path} learns, and {ref} holds what it made before: cache again")
            found = fingerprint(part, tensors[part])
            if found != made:
                raise UserError(
                    f"{ref} was made by the {part} of {held.model} ({made}), and that of "
                    f"{task.model.name} is another ({found}): cache again"
                )


def learned(task: Task, tensors: Mapping[str, Tensors]) -> dict[str, str]:
    """By part, a path that learns of those that make what a cache holds; "" where none does."""
    given = {
        f"{part}/{path}": jax.ShapeDtypeStruct(tensor.shape, jnp.float32)
        for part, of in tensors.items()
        for path, tensor in of.items()
    }
    shapes = jax.eval_shape(task.init, jax.random.key(0), trees.unflatten(given))
    paths = [path for path in trees.flatten(shapes) if task.learns(path)]
    # Factors of a kernel lie elsewhere in the tree, and have its path in theirs.
    return {
        part: next((path for path in paths if any(prefix in path for prefix in prefixes)), "")
        for part, prefixes in ENCODERS.items()
    }


def fingerprint(part: str, tensors: Tensors) -> str:
    """A checksum of the values, as float32, by which a part makes what a cache holds."""
    crc = 0
    for path in sorted(tensors):
        if f"{part}/{path}".startswith(ENCODERS[part]):
            tensor = tensors[path]
            whole = tensor.read(tuple(slice(0, side) for side in tensor.shape))
            values = np.ascontiguousarray(whole, np.float32)
            crc = zlib.crc32(values.data, zlib.crc32(path.encode(), crc))
    return f"{crc:08x}"

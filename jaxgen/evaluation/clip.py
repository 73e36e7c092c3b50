"""Pictures and texts in the one space of a CLIP: scores, and who finds whom.

Any folder of transformers' CLIPModel serves (safetensors), such as the `clip` that a run of
`tasks.contrastive` ends with.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxgen import config, trees
from jaxgen.data.tokenizer import Tokenizer
from jaxgen.load import read_params
from jaxgen.models.clip import TextEncoder
from jaxgen.models.clip_config import FIXED, TextConfig, VisionConfig
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.models.layers import linear
from jaxgen.parts import Part, checked
from jaxgen.tasks.base import tokens_of
from jaxgen.tasks.contrastive import pixels_of
from jaxgen.types import Array, Params, UserError, full_precision
from jaxgen.weights import files, rename

BATCH = 64  # pictures or texts at a time
SEEING = ("vision_model", "visual_projection")  # the image encoder's share of the parameters
VISION = Part(
    "image_encoder", "model", "transformers", "CLIPVisionModelWithProjection", VisionEncoder.read
)


@dataclass(frozen=True)
class Clip:
    """Two encoders, the parameters of both with the projections, and the vocabulary."""

    text: TextEncoder
    vision: VisionEncoder
    params: Params
    tokenizer: Tokenizer


def open_clip(folder: str | Path) -> Clip:
    """Reads a CLIP folder, float32.

    Raises:
        UserError: one line that names what is missing, damaged or not supported.
    """
    folder, where = Path(folder), Path(folder) / "config.json"
    if not where.is_file():
        raise UserError(f"{folder} is no CLIP folder: it has no config.json")
    data = config.read_json(where)
    width = data.get("projection_dim", 512)
    given: list[dict[str, Any]] = [
        {**part, "projection_dim": width}
        for part in (data.get("text_config"), data.get("vision_config"))
        if isinstance(part, dict)
    ]
    if data.get("model_type") != "clip" or len(given) < 2:
        raise UserError(f"{where} is not of a CLIP with a text and an image encoder")
    text = TextEncoder(config.parse(TextConfig, given[0], FIXED, f"{where}: text_config"), True)
    vision = VisionEncoder(config.parse(VisionConfig, given[1], FIXED, f"{where}: vision_config"))
    released = {
        key: tensor
        for key, tensor in files.open_folder(folder, "model", "").items()
        if not key.endswith("position_ids")  # a buffer of old files
    }
    tensors = rename.by_path(released)
    expected = trees.flatten({**trees.shapes(text.init), **trees.shapes(vision.init)})
    expected["logit_scale"] = jax.ShapeDtypeStruct((), jnp.float32)
    whole = [rename.to_key(p) for p, t in tensors.items() if t.dtype not in files.FLOATS]
    files.report(_shapes(expected), _shapes(tensors), str(folder), whole)
    tokenizer = Tokenizer.read(folder)
    known, places = text.config.vocab_size, text.config.max_position_embeddings
    if tokenizer.size > known or tokenizer.length > places:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.size} tokens and fills {tokenizer.length} "
            f"places, its text encoder {known} and {places}"
        )
    return Clip(text, vision, read_params({"clip": tensors})["clip"], tokenizer)


def open_vision(folder: str | Path) -> tuple[VisionEncoder, Params]:
    """The image encoder of a CLIP folder, or of a folder that holds it alone; float32.

    Such are `image_encoder/` of diffusers, and what CLIPVisionModelWithProjection saves.

    Raises:
        UserError: one line that names what is missing, damaged or not supported.
    """
    folder, where = Path(folder), Path(folder) / "config.json"
    if where.is_file() and config.read_json(where).get("model_type") == "clip_vision_model":
        vision, released = VISION.open(folder)
        held = {k: t for k, t in released.items() if not k.endswith("position_ids")}
        tensors = {"clip": checked(vision, held, str(folder))}
        return vision, read_params(tensors)["clip"]
    clip = open_clip(folder)
    return clip.vision, {name: clip.params[name] for name in SEEING}


def _shapes(flat: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    return {rename.to_key(path): tuple(leaf.shape) for path, leaf in flat.items()}


def embed_images(clip: Clip, images: Sequence[np.ndarray], progress: bool = False) -> np.ndarray:
    """Pictures uint8 [H, W, 3] of any sizes -> unit vectors float32 [B, P]."""
    see = partial(_see, clip.params, vision=clip.vision)
    resized = partial(_resized, side=clip.vision.config.image_size)
    return _in_batches(see, images, resized, progress)


def embed_texts(clip: Clip, texts: Sequence[str]) -> np.ndarray:
    """Texts, cut where the tokenizer's length ends -> unit vectors float32 [B, P]."""
    read = partial(_read, clip.params, text=clip.text)
    return _in_batches(read, texts, partial(tokens_of, clip.tokenizer))


def clip_score(clip: Clip, images: Sequence[np.ndarray], texts: Sequence[str]) -> np.ndarray:
    """100 max(cos, 0) of each picture and its text, float32 [B] (Hessel et al. 2021, w = 100)."""
    _check_pairs(images, texts)
    return score_of(embed_images(clip, images), embed_texts(clip, texts))


def score_of(images: np.ndarray, texts: np.ndarray) -> np.ndarray:
    """The same, of what `embed_images` and `embed_texts` made, [B, P] each."""
    return 100 * np.maximum((images * texts).sum(-1), 0)


def for_kid(images: np.ndarray) -> np.ndarray:
    """What `embed_images` made, [B, P], as features for `distances.kid`.

    They are made as long as the root of P, so that x.y / P in its kernel is a cosine; between unit
    vectors the kernel would hardly differ from a straight line, and compare means alone.
    """
    return images * np.float32(np.sqrt(images.shape[1]))


def retrieval(clip: Clip, images: Sequence[np.ndarray], texts: Sequence[str]) -> dict[str, float]:
    """Shares of pictures whose text is nearest of all, and of texts whose picture is."""
    _check_pairs(images, texts)
    scores = embed_images(clip, images) @ embed_texts(clip, texts).T
    own = np.arange(len(scores))
    return {
        "caption of a picture": float((scores.argmax(1) == own).mean()),
        "picture of a caption": float((scores.argmax(0) == own).mean()),
    }


def _check_pairs(images: Sequence[np.ndarray], texts: Sequence[str]) -> None:
    if len(images) != len(texts):
        raise UserError(f"{len(images)} pictures have {len(texts)} texts; each needs one")


def _resized(image: np.ndarray, side: int) -> np.ndarray:
    """The middle square at CLIP's size, as its own preprocessing makes it; uint8 RGB."""
    height, width = image.shape[:2]
    if (height, width) == (side, side):
        return image
    short = min(height, width)
    most = 4 * short  # the rest of a strip is far from the middle, and could fill the memory
    if max(height, width) > most:
        top, left = (max(0, (n - most) // 2) for n in (height, width))
        image = image[top : top + most, left : left + most]
        height, width = image.shape[:2]
    new = (side * width // short, side * height // short)
    picture = Image.fromarray(image).resize(new, Image.Resampling.BICUBIC)
    left, top = ((n - side) // 2 for n in new)
    return np.asarray(picture.crop((left, top, left + side, top + side)))


def _in_batches(
    embed: Any, rows: Sequence[Any], prepare: Callable[[Any], np.ndarray], progress: bool = False
) -> np.ndarray:
    """Batches of one size, so that one program serves all: the last is filled up."""
    if not rows:
        raise UserError("there is nothing to embed")
    size = min(BATCH, len(rows))
    found = []
    starts = range(0, len(rows), size)
    for start in tqdm(starts, "CLIP", unit="batch", leave=False, disable=not progress):
        batch = np.stack([prepare(row) for row in rows[start : start + size]])
        room = ((0, size - len(batch)), *((0, 0),) * (batch.ndim - 1))
        found.append(np.asarray(embed(np.pad(batch, room)))[: len(batch)])
    return np.concatenate(found)


@partial(jax.jit, static_argnames="vision")
@full_precision
def _see(params: Params, images: Array, *, vision: VisionEncoder) -> Array:
    return _unit(vision.apply({name: params[name] for name in SEEING}, pixels_of(images))[1])


@partial(jax.jit, static_argnames="text")
@full_precision
def _read(params: Params, ids: Array, *, text: TextEncoder) -> Array:
    encoder = replace(text, projected=False)
    _, pooled = encoder.apply({"text_model": params["text_model"]}, ids)
    return _unit(linear(params["text_projection"], pooled))


def _unit(x: Array) -> Array:
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

"""Reference pictures, as a search compares with them: at the model's size, encoded, averaged."""

import unicodedata
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from jaxgen.conditioning import encode_image, unit
from jaxgen.data import images
from jaxgen.data.folder import METADATA
from jaxgen.denoiser import Model
from jaxgen.plan import Plan
from jaxgen.seedselect.objective import ClipDistance, Score, Targets
from jaxgen.seedselect.search import Search
from jaxgen.types import Array, Params, UserError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
MOST = 1000  # pictures of one class that are read
SUBSET = 1  # tells what is drawn here from what else a seed draws
FEW = 3  # of which the paper makes a centroid, at least


class References(NamedTuple):
    """What is known of one class's pictures."""

    latents: Array  # [K, h, w, C], or [0, 0]
    embeddings: Array  # [K, P], or [K, 0] where another score takes the place of meaning


def find(folder: Path) -> list[Path]:
    """The pictures of a folder by name. UserError for one that is missing, or holds none."""
    if not folder.is_dir():
        raise UserError(f"no folder of pictures {folder}")
    paths = [p for p in _inside(folder) if p.suffix.lower() in SUFFIXES]
    if not paths:
        raise UserError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    if len(paths) > MOST:
        raise UserError(f"{folder} holds {len(paths)} pictures, over {MOST}; a few are enough")
    if len(paths) < FEW:
        only = "a single picture" if len(paths) == 1 else f"{len(paths)} pictures"
        images.warn_once(f"{folder} holds {only}; {FEW} to 5 tell the subject from its scene")
    return paths


def find_classes(folder: Path) -> dict[str, list[Path]] | None:
    """The pictures of each folder in a folder, by name; None where it is a folder of pictures.

    Such a one may hold folders if it is listed, as training folders are (metadata.jsonl).

    Raises:
        UserError: as `find` does, and for a folder that holds both.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of pictures {folder}")
    classes = [p for p in _inside(folder) if p.is_dir()]
    loose = [p for p in _inside(folder) if p.suffix.lower() in SUFFIXES]
    if (folder / METADATA).is_file():
        return None
    if classes and loose:
        raise UserError(
            f"{folder} holds both pictures ({loose[0].name}) and folders ({classes[0].name}); "
            "name a folder of pictures, or one with a folder for each class"
        )
    for path in classes:
        # Control characters, and bytes that are no UTF-8, which Python shows as surrogates.
        if any(unicodedata.category(letter) in ("Cc", "Cs") for letter in path.name):
            raise UserError(f"the folder {path.name!a} is no name of a class; rename it")
    return {p.name: find(p) for p in classes} or None


def _inside(folder: Path) -> list[Path]:
    """What a folder holds, by name, but for what is hidden."""
    return sorted(p for p in folder.iterdir() if not p.name.startswith("."))


def read(paths: Sequence[Path], size: tuple[int, int]) -> list[np.ndarray]:
    """Pictures, uint8 [H, W, 3], at a width and height. UserError for one that cannot be read."""
    return [fit(images.read_image(path), *size) for path in paths]


def fit(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """The largest middle part of a picture with a size's shape, at that size; uint8 RGB."""
    if picture.shape[:2] == (height, width):
        return picture
    rows, columns = picture.shape[:2]
    scale = min(columns / width, rows / height)
    across, down = scale * width, scale * height
    left, top = (columns - across) / 2, (rows - down) / 2
    box = (left, top, left + across, top + down)
    resized = Image.fromarray(picture).resize((width, height), Image.Resampling.LANCZOS, box=box)
    return np.asarray(resized)


def encode(
    model: Model,
    params: Params,
    pictures: Sequence[np.ndarray],
    size: tuple[int, int],
    meaning: Score,
) -> References:
    """Pictures of one class, uint8 [H, W, 3] of any sizes, in the spaces of VAE and judge.

    Args:
        size: width and height that the search's images have.
        meaning: of a judge, or another score, which has no space.
    """
    latents, seen = [], []
    for picture in pictures:  # one by one: their number compiles nothing
        image = jnp.asarray(unit(fit(picture, *size))[None])
        latents.append(encode_image(params["vae"], image, vae=model.vae)[0])
        if isinstance(meaning.apply, ClipDistance):
            seen.append(_embed(meaning.params, image, distance=meaning.apply)[0])
    nothing = jnp.zeros((len(pictures), 0))
    return References(*(jnp.stack(rows) if rows else nothing for rows in (latents, seen)))


@partial(jax.jit, static_argnames="distance")
def _embed(judge: Params, image: Array, *, distance: ClipDistance) -> Array:
    return distance.embed(judge, image)


def subset(count: int, wanted: int, seed: int, number: int) -> np.ndarray:
    """Which of `count` references a seed's centroids are made of: `wanted`, or all of them for 0.

    They depend on the seed and the image's number alone.
    """
    if not wanted or wanted >= count:
        return np.arange(count)
    draw = np.random.default_rng([seed, number, SUBSET])
    return np.sort(draw.choice(count, wanted, replace=False))


def targets(
    checked: Plan, known: list[References], meaning: Score, how: Search
) -> Callable[[list[int]], tuple[Any, Array]]:
    """A function of indices: what those seeds are compared with, for the score and in latents.

    Each seed has centroids of its own, where they are made of a subset of the references.
    """
    count, seed, apply = checked.request.count, checked.request.seed, meaning.apply
    centroids: list[Array] = []
    if isinstance(apply, ClipDistance) and apply.contrast:
        centroids = [apply.centroid(rows.embeddings) for rows in known]

    def of(index: int) -> tuple[Any, Array]:
        mine, number = divmod(index, count)
        chosen = subset(len(known[mine].latents), how.subset, seed, number)
        appearance = jnp.zeros(checked.latent_shape)  # without references, and without weight
        if len(chosen):
            appearance = known[mine].latents[chosen].mean(0)
        if not isinstance(apply, ClipDistance):
            return jax.tree.map(lambda leaf: jnp.asarray(leaf)[index], meaning.rows), appearance
        own = apply.centroid(known[mine].embeddings[chosen])
        others = [row for i, row in enumerate(centroids) if i != mine]
        return Targets(own, jnp.stack(others) if others else own[None][:0]), appearance

    return lambda indices: jax.tree.map(lambda *rows: jnp.stack(rows), *map(of, indices))

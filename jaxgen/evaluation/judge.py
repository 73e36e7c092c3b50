"""The judge of emoji_scenes: what is where in a picture, its style and background.

Two small networks, trained on real scenes alone (train/judge.py) and on no sample of any model,
which in turn never learn from them. The finder tells subjects from background, and at each cell of
a subject the box around the whole of it (Tian et al. 2019); cells whose boxes agree are one. The
namer tells which subject a box shows, or that it shows none, and in which style.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxgen import trees
from jaxgen.data.emoji_scenes import artwork, backgrounds
from jaxgen.load import read_params
from jaxgen.models.layers import Conv, Dense, Downsample, ResBlock, resize_nearest
from jaxgen.models.norms import GroupNorm
from jaxgen.refs import ASSETS
from jaxgen.types import Array, Params, UserError, full_precision
from jaxgen.weights import files, rename

FOLDER = ASSETS / "judge"
STEM = "model"
SIDE = 64  # of the pictures
CELLS = SIDE // 2  # along a side, of what the finder says
CROP = 32  # side of what the namer reads
GROUPS = 8
LEAST = 16  # cells that agree on a box; the thinnest subject at its smallest takes 22
ALIKE = 0.5  # intersection over union of boxes that are one
BATCH = 64  # pictures at a time


class Finder(nn.Module):
    """Down to the whole picture and up again to its cells, skips joined."""

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array, Array]:
        """uint8 [B, 64, 64, 3] -> logits of cells [B, 32, 32], boxes, and logits of the background.

        Returns:
            Whether a cell shows a subject; [B, 32, 32, 4], how far from its middle the subject's
            box reaches to the left, up, to the right and down, in sides of the picture; [B, 10] of
            colours, as in `backgrounds.COLOURS`.
        """
        widths = (24, 48, 64, 64)  # at sides 32, 16, 8 and 4
        block = partial(ResBlock, groups=GROUPS)
        x = Conv(widths[0], stride=2, name="conv_in")(_centred(images))
        skips = []
        for level, width in enumerate(widths):
            if level:
                x = Downsample(width, name=f"halve_{level}")(x)
            x = block(width, name=f"level_{level}")(x)
            skips.append(x)
        seen = nn.silu(GroupNorm(GROUPS, 1e-5, name="norm_whole")(x)).mean((1, 2))
        for level in (2, 1, 0):
            x = jnp.concatenate([resize_nearest(x, *skips[level].shape[1:3]), skips[level]], -1)
            norm = GroupNorm(GROUPS, 1e-5, name=f"norm_up_{level}").affine(x)
            x = Conv(max(32, widths[level]), name=f"up_{level}")(x, norm)
        out = Conv(5, name="conv_out")(x, GroupNorm(GROUPS, 1e-5, name="norm_out").affine(x))
        colour = Dense(len(backgrounds.COLOURS), name="colour")(seen)
        return out[..., 0], nn.softplus(out[..., 1:]), colour


class Namer(nn.Module):
    """What a box shows."""

    subjects: int

    @nn.compact
    def __call__(self, crops: Array) -> tuple[Array, Array]:
        """uint8 [B, 32, 32, 3] -> logits [B, 1 + subjects], the first of no subject, and of styles.

        Those are [B, 3], as in `artwork.STYLES`.
        """
        x = Conv(24, name="conv_in")(_centred(crops))
        for level, width in enumerate((32, 64, 128)):
            x = Downsample(width, name=f"halve_{level}")(x)
            x = ResBlock(width, groups=GROUPS, name=f"level_{level}")(x)
        x = nn.silu(GroupNorm(GROUPS, 1e-5, name="norm_out")(x))
        # Where it is counts, too: crops are boxes, so that a part is always at its place.
        x = nn.silu(Dense(192, name="whole")(x.reshape(len(x), -1)))
        return Dense(1 + self.subjects, name="name")(x), Dense(len(artwork.STYLES), name="style")(x)


@dataclass(frozen=True)
class Found:
    """A subject in a picture: its number, style, box (x0, y0, x1, y1 of sides) and cells."""

    subject: int
    style: str
    box: tuple[float, float, float, float]
    cells: np.ndarray  # bool [32, 32]


@dataclass(frozen=True)
class Seen:
    """What a picture shows, by the judge: subjects, and its background's colour."""

    found: list[Found]
    colour: str


def namer() -> Namer:
    """The network for the subjects of the artwork."""
    return Namer(len(artwork.load().subjects))


def init(key: Array) -> Params:
    """Fresh parameters of both."""
    one, two = jax.random.split(key)
    picture, crop = (jnp.zeros((1, side, side, 3), jnp.uint8) for side in (SIDE, CROP))
    return {
        "finder": Finder().init(one, picture)["params"],
        "namer": namer().init(two, crop)["params"],
    }


def read(folder: Path = FOLDER) -> Params:
    """The judge's parameters, float32. UserError, in one line, for what is missing or damaged."""
    tensors = rename.by_path(files.open_folder(folder, STEM, ""))
    expected = {p: leaf.shape for p, leaf in trees.flatten(trees.shapes(init)).items()}
    files.report(expected, {p: tensor.shape for p, tensor in tensors.items()}, str(folder))
    return read_params({"judge": tensors})["judge"]


def look(params: Params, images: Sequence[np.ndarray], progress: bool = False) -> list[Seen]:
    """Judges pictures uint8 [64, 64, 3]. UserError for one of another shape."""
    for image in images:
        if image.shape != (SIDE, SIDE, 3):
            raise UserError(f"the judge sees pictures [64, 64, 3], not {list(image.shape)}")
    if not len(images):
        raise UserError("there is nothing to judge")
    bars = ("finding", "naming") if progress else ("", "")
    shown, boxes, colours = _in_batches(partial(_find, params["finder"]), images, bars[0])
    parts = [instances(*cells) for cells in zip(shown, boxes)]
    crops = [crop(image, box) for image, found in zip(images, parts) for box, _ in found]
    name_them = partial(_name, params["namer"])
    names = zip(*_in_batches(name_them, crops, bars[1])) if crops else iter(())
    seen = []
    for found, colour in zip(parts, colours):
        subjects = []
        for (box, cells), (name, style) in zip(found, names):
            if name:  # which is of something
                subjects.append(Found(int(name) - 1, artwork.STYLES[style], box, cells))
        seen.append(Seen(subjects, list(backgrounds.COLOURS)[colour]))
    return seen


def instances(
    shown: np.ndarray, reach: np.ndarray
) -> list[tuple[tuple[float, float, float, float], np.ndarray]]:
    """Cells [32, 32] and how far their boxes reach [32, 32, 4] -> boxes and cells of subjects.

    The box on which most cells agree first; those cells are taken, and so on.
    """
    rows, columns = np.nonzero(shown)
    middle = np.stack([columns, rows, columns, rows], -1) / CELLS + 0.5 / CELLS
    boxes = middle + reach[rows, columns] * (-1, -1, 1, 1)
    left, found = np.arange(len(boxes)), []
    while len(left) >= LEAST:
        agree = overlaps(boxes[left]) >= ALIKE
        best = agree[agree.sum(1).argmax()]
        if best.sum() < LEAST:
            break
        mine = left[best]
        cells = np.zeros_like(shown)
        cells[rows[mine], columns[mine]] = True
        box = np.median(boxes[mine], 0).clip(0, 1)
        found.append(((box[0], box[1], box[2], box[3]), cells))
        left = left[~best]
    return found


def overlaps(boxes: np.ndarray) -> np.ndarray:
    """Intersection over union of each two of boxes [N, 4] -> [N, N]."""
    low = np.maximum(boxes[:, None, :2], boxes[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], boxes[None, :, 2:])
    both = (high - low).clip(0).prod(-1)
    area = (boxes[:, 2:] - boxes[:, :2]).prod(-1)
    return both / np.maximum(area[:, None] + area[None] - both, 1e-9)


def crop(image: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
    """What a box of fractions holds, and a pixel around it, uint8 [32, 32, 3]."""
    x0, y0, x1, y1 = (SIDE * edge for edge in box)
    around = (max(0, x0 - 1), max(0, y0 - 1), min(SIDE, x1 + 1), min(SIDE, y1 + 1))
    return np.asarray(
        Image.fromarray(image).resize((CROP, CROP), Image.Resampling.BILINEAR, box=around)
    )


def _centred(images: Array) -> Array:
    return images / jnp.float32(127.5) - 1


def _in_batches(program: partial, rows: Sequence[np.ndarray], bar: str) -> list[np.ndarray]:
    """What a program makes of rows; one program serves all batches, the last is filled up.

    A progress bar is shown where it has a name.
    """
    parts = []
    starts = range(0, len(rows), BATCH)
    for start in tqdm(starts, bar, unit="batch", leave=False, disable=not bar):
        batch = np.stack(rows[start : start + BATCH])
        room = ((0, BATCH - len(batch)), *((0, 0),) * 3)
        parts.append([np.asarray(a)[: len(batch)] for a in program(np.pad(batch, room))])
    return [np.concatenate(found) for found in zip(*parts)]


@jax.jit
@full_precision
def _find(params: Params, images: Array) -> tuple[Array, ...]:
    shown, boxes, colour = Finder().apply({"params": params}, images)
    return shown > 0, boxes, colour.argmax(-1)


@jax.jit
@full_precision
def _name(params: Params, crops: Array) -> tuple[Array, Array]:
    name, style = namer().apply({"params": params}, crops)
    return name.argmax(-1), style.argmax(-1)

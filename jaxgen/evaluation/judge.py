"""The judge of emoji_scenes: what is where in a picture, its style and background.

One small network, trained on real scenes alone (train/judge.py) and on no sample of any model,
which in turn never learn from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import trees
from jaxgen.data.emoji_scenes import artwork, backgrounds
from jaxgen.load import ASSETS, read_params
from jaxgen.models.layers import Conv, Dense, Downsample, ResBlock, resize_nearest
from jaxgen.models.norms import GroupNorm
from jaxgen.types import Array, Params, UserError, full_precision
from jaxgen.weights import files, rename

FOLDER = ASSETS / "judge"
STEM = "model"
WIDTHS = (32, 64, 128, 128)  # of features at sides 32, 16, 8 and 4
TOP = 64  # of those that tell what a pixel belongs to
SIDE = 64  # of the pictures that it reads
CELLS = SIDE // 2  # along a side, of what it says
GROUPS = 8
BATCH = 64  # pictures at a time


class Verdict(nn.Module):
    """Down to the whole picture and up again to its cells, skips joined."""

    subjects: int

    @nn.compact
    def __call__(self, images: Array) -> tuple[Array, Array, Array]:
        """uint8 [B, 64, 64, 3] -> logits.

        Returns:
            [B, 32, 32, 1 + subjects] of cells, the background first; [B, 3] of styles, as in
            `artwork.STYLES`; [B, 10] of the background's colours, as in `backgrounds.COLOURS`.
        """
        block = partial(ResBlock, groups=GROUPS)
        x = Conv(WIDTHS[0], stride=2, name="conv_in")(images / jnp.float32(127.5) - 1)
        skips = []
        for level, width in enumerate(WIDTHS):
            if level:
                x = block(width, name=f"down_{level}")(Downsample(width, name=f"halve_{level}")(x))
            x = block(width, name=f"level_{level}")(x)
            skips.append(x)
        seen = nn.silu(GroupNorm(GROUPS, 1e-5, name="norm_whole")(x)).mean((1, 2))
        style = Dense(len(artwork.STYLES), name="style")(seen)
        colour = Dense(len(backgrounds.COLOURS), name="colour")(seen)
        for level in (2, 1, 0):
            skip = skips[level]
            width = max(WIDTHS[level], TOP)
            x = Conv(width, kernel=1, name=f"narrow_{level}")(x)
            x = jnp.concatenate([resize_nearest(x, *skip.shape[1:3]), skip], -1)
            norm = GroupNorm(GROUPS, 1e-5, name=f"norm_up_{level}").affine(x)
            x = Conv(width, name=f"up_{level}")(x, norm)
        h = nn.silu(GroupNorm(GROUPS, 1e-5, name="norm_out")(x))
        return Conv(1 + self.subjects, kernel=1, name="conv_out")(h), style, colour


@dataclass(frozen=True)
class Seen:
    """What pictures show, by the judge.

    Attributes:
        cells: int16 [B, 32, 32], 0 or 1 + the number of the subject.
        style: int [B], of `artwork.STYLES`.
        colour: int [B], of `backgrounds.COLOURS`.
    """

    cells: np.ndarray
    style: np.ndarray
    colour: np.ndarray


def network() -> Verdict:
    """The network for the subjects of the artwork."""
    return Verdict(len(artwork.load().subjects))


def init(key: Array) -> Params:
    """Fresh parameters."""
    return network().init(key, jnp.zeros((1, SIDE, SIDE, 3), jnp.uint8))["params"]


def read(folder: Path = FOLDER) -> Params:
    """The judge's parameters, float32. UserError, in one line, for what is missing or damaged."""
    tensors = rename.by_path(files.open_folder(folder, STEM, ""))
    expected = {p: leaf.shape for p, leaf in trees.flatten(trees.shapes(init)).items()}
    files.report(expected, {p: tensor.shape for p, tensor in tensors.items()}, str(folder))
    return read_params({"judge": tensors})["judge"]


def look(params: Params, images: Sequence[np.ndarray]) -> Seen:
    """Judges pictures uint8 [64, 64, 3]. UserError for one of another size."""
    for image in images:
        if image.shape != (SIDE, SIDE, 3):
            height, width = image.shape[:2]
            raise UserError(f"the judge sees pictures of 64x64, not of {width}x{height}")
    parts = []
    for start in range(0, len(images), BATCH):
        batch = np.stack(images[start : start + BATCH])
        room = ((0, BATCH - len(batch)), *((0, 0),) * 3)  # one program serves all batches
        parts.append([np.asarray(a)[: len(batch)] for a in _look(params, np.pad(batch, room))])
    if not parts:
        raise UserError("there is nothing to judge")
    return Seen(*(np.concatenate(found) for found in zip(*parts)))


@jax.jit
@full_precision
def _look(params: Params, images: Array) -> tuple[Array, Array, Array]:
    cells, style, colour = network().apply({"params": params}, images)
    return cells.argmax(-1).astype(jnp.int16), style.argmax(-1), colour.argmax(-1)

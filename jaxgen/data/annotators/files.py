"""Hints of files that hold numbers, labels or depth: read as they are stored, as training does."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from jaxgen.data import examples, images
from jaxgen.data.annotators import maps, networks
from jaxgen.data.examples import BadExample
from jaxgen.types import UserError

# Of a picture of depth, which has no unit: a step of 8 bits then tilts by a third of a right angle,
# at the network's size, so that flat stays flat. MiDaS' own depth, whose steps are finer, has a
# larger range.
RELIEF = 255.0
LONGEST = 16  # times as long as wide: what is longer would fill the memory at the network's size


def labels(file: Path) -> np.ndarray:
    """A map of ADE20K's labels, as its files are (0 is other, then 150 classes) -> its colours.

    Raises:
        UserError: for a picture of colours, and for labels that ADE20K has not.
    """
    return _coloured(file, maps.ADE20K_FILES, "of ADE20K's files; distinct colours other classes")


def distinct(file: Path) -> np.ndarray:
    """A map of labels, 0 to 255 -> the colours of classes without a palette; 0 is black.

    They are those of a ControlNet that learned with `--task.palette distinct`, as by
    configs/mini_segmentation.py. Raises UserError as `labels` does.
    """
    return _coloured(file, maps.distinct(256), "that have a colour")


def normal(file: Path) -> np.ndarray:
    """Normals of a picture of depth, grey of 8 or 16 bits, near is bright; or of a photo.

    Slopes are those at one size, as of the network's depth. Of a picture with colours, a network
    finds the depth first. That a grey one is taken for depth, and not for a photo in black and
    white, is said.

    Raises:
        UserError: for what is no picture, and for a photo without the network's packages.
    """
    picture = images.read_image(file)
    height, width = picture.shape[:2]
    if max(height, width) > LONGEST * min(height, width):
        raise UserError(f"{file} is a strip of {width}x{height}, which is no picture of depth")
    if (picture != picture[..., :1]).any():
        return networks.normal(picture)
    images.warn_once(f"{file} is grey, and is taken for depth (near is bright), not for a photo")
    with Image.open(file, formats=images.FORMATS) as stored:
        deep = stored.mode.startswith("I")  # 16 bits, which `read_image` rounds to 8
        near = np.asarray(ImageOps.exif_transpose(stored)) if deep else picture[..., 0]
    size = [round(side * networks.SIDE / min(near.shape)) for side in (width, height)]
    sized = Image.fromarray(near.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    depth = np.clip(np.asarray(sized), near.min(), near.max())  # which it overshoots
    return images.resize(maps.normals(depth, relief=RELIEF), width, height)


def _coloured(file: Path, palette: np.ndarray, which: str) -> np.ndarray:
    found = _read_labels(file)
    if not 0 <= found.min() <= found.max() < len(palette):
        raise UserError(
            f"{file} holds labels from {found.min()} to {found.max()}, and not the 0 to "
            f"{len(palette) - 1} {which}"
        )
    return maps.segmentation(found, palette)


def _read_labels(file: Path) -> np.ndarray:
    """Integers [H, W], upright. UserError for what holds colours, or cannot be read."""
    try:
        with examples.opened(file, str(file)) as stored:
            if stored.format == "JPEG":
                raise BadExample(str(file), "a JPEG blurs the numbers of labels; take a PNG")
            flat = stored.mode in examples.NUMBERS
            found = np.asarray(ImageOps.exif_transpose(stored)) if flat else np.zeros(0)
    except BadExample as error:
        raise UserError(f"cannot read {file}: {error.reason}") from None
    if not flat:
        raise UserError(
            f"{file} holds colours, not the numbers of labels; if they are the right ones already, "
            "name no annotator"
        )
    return found.astype(np.int32)

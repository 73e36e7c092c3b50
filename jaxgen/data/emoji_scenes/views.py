"""Other views of one subject of emoji_scenes, for learning in context."""

from typing import NamedTuple

import numpy as np
from PIL import Image

from jaxgen.data.emoji_scenes import artwork, backgrounds, captions, drawing
from jaxgen.data.emoji_scenes.backgrounds import SIDE
from jaxgen.data.emoji_scenes.scenes import alike, check_seed
from jaxgen.data.examples import Example, Source
from jaxgen.types import UserError

TURN = 25.0  # degrees at most
MOST = 1000  # views of a subject, as a source
STREAM = 1 << 62  # no scene draws from a stream with this bit


class Views(NamedTuple):
    """Pictures of one subject alone."""

    images: np.ndarray  # uint8 [K, 64, 64, 3]
    masks: np.ndarray  # bool [K, 64, 64]
    captions: list[str]


def views(subject: int | str, key: int, count: int) -> Views:
    """Other views of a subject: any style, mirrored, turned, of any size, on plain colours.

    "modern" is a style of views alone. View k depends on the subject, the key and k alone.

    Args:
        subject: number or name; held ones too.
        key: a seed, from 0 to 2**63 - 1.
        count: from 1.

    Raises:
        UserError: for a subject that there is not, or another key or count.
    """
    check_seed(key)
    if count < 1:
        raise UserError(f"count {count} is not a whole number from 1")
    art = artwork.load()
    number = art.number(subject) if isinstance(subject, str) else subject
    if not 0 <= number < len(art.subjects):
        raise UserError(
            f"no subject {number} in emoji_scenes; they are 0 to {len(art.subjects) - 1}"
        )
    found = [_view(number, key, k) for k in range(count)]
    images, masks, words = zip(*found, strict=True)
    return Views(np.stack(images), np.stack(masks), list(words))


def _view(number: int, key: int, k: int) -> tuple[np.ndarray, np.ndarray, str]:
    """View k of a subject: the picture, where the subject is, and the caption."""
    art = artwork.load()
    rng = np.random.Generator(np.random.Philox(key=[key, STREAM | number << 40 | k]))
    style = artwork.VIEW_STYLES[rng.integers(len(artwork.VIEW_STYLES))]
    colour = backgrounds.pick_colour(alike(number, style), rng)
    sprite = _turned(art.cell(number, style), rng)

    image, mask = backgrounds.paint(colour, "plain", rng), np.zeros((SIDE, SIDE), bool)
    h, w = sprite.shape[:2]
    y, x = rng.integers(0, (SIDE - h + 1, SIDE - w + 1))
    window = slice(y, y + h), slice(x, x + w)
    mask[window] = drawing.composite(image[window], sprite)
    where = captions.background(colour)
    return image, mask, f"{captions.noun(art.subjects[number])}, {style} style, on {where}"


class SubjectViews(Source):
    """Views of one subject as a source of data: `image`, `caption`, and the subject's `mask`.

    Args:
        name: of the subject.
        seed: another one gives other views.

    Raises:
        UserError: for a subject that there is not, or such a seed.
    """

    def __init__(self, name: str, seed: int = 0):
        check_seed(seed)
        self.number, self.seed = artwork.load().number(name), seed
        self.ref = f"views of {name}"

    def __len__(self) -> int:
        return MOST

    def read(self, i: int, least: int | None = None) -> Example:
        image, mask, caption = _view(self.number, self.seed, i)
        return {"image": image, "mask": mask, "caption": caption}

    def size(self, i: int) -> tuple[int, int]:
        return SIDE, SIDE

    def name(self, i: int) -> str:
        return f"{self.ref}[{i}]"


def _turned(art: Image.Image, rng: np.random.Generator) -> np.ndarray:
    """A sprite at an angle, its longer side 24 to 56 pixels.

    That is the side of what the turned sprite lies in, corners and all: what is visible of it may
    be shorter.
    """
    if rng.random() < 0.5:
        art = art.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    angle = rng.uniform(-TURN, TURN) if rng.random() < 0.75 else 0.0
    art = art.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    scale = rng.integers(24, 57) / max(art.size)
    width, height = art.size
    return artwork.scaled(art, (max(1, round(width * scale)), max(1, round(height * scale))))

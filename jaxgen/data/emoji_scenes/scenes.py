"""`emoji_scenes`: pictures of 64x64 composed of real artwork, of which everything is known.

Scene i of a split depends on (seed, split, i) alone, and nothing is stored. `longtail.py` says
which subjects a scene shows, `layout.py` where, `captions.py` what is said of it; `views.py` shows
one subject in other ways.
"""

import zlib
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np

from jaxgen.data import examples
from jaxgen.data.emoji_scenes import artwork, backgrounds, captions, drawing, layout, longtail
from jaxgen.data.emoji_scenes.backgrounds import SIDE
from jaxgen.data.emoji_scenes.longtail import SPLITS
from jaxgen.data.examples import Example, Source
from jaxgen.types import UserError

NAME = "emoji_scenes"
PICTURES = ("mask", "segmentation", "edges", "lines")  # columns that are drawn where asked for
CLEAR = 36.0  # distance in Lab of a subject from a background that it stands out from


@dataclass(frozen=True)
class Scene:
    """What a scene shows, before it is drawn: the truth for judges.

    Attributes:
        subjects: numbers of one to three subjects, each another one, in the caption's order.
        sizes: small (to 24 pixels), medium, or large (from 36).
        relations: where the first one lies from the second, and the third one from both.
        corners: x and y of the upper left of each sprite.
        sides: pixels of the longer side of each.
        mirrored: whether each is.
    """

    subjects: tuple[int, ...]
    style: str
    colour: str
    pattern: str
    caption: str
    sizes: tuple[str, ...]
    relations: tuple[str, ...]
    corners: tuple[tuple[int, int], ...]
    sides: tuple[int, ...]
    mirrored: tuple[bool, ...]


class EmojiScenes(Source):
    """A split of the scenes, as a source of training data.

    Columns of every example, beside `image` uint8 [64, 64, 3] and `caption`: `things`, a caption of
    the subjects alone; `boxes` float32 [N, 4], tight around what is visible, with `phrases`;
    `subject` [N], their numbers; and the words `sizes`, `style`, `colour`, `pattern`, `relations`.
    Drawn where asked for: `mask` bool [64, 64]; `segmentation` uint8 [64, 64], 0 or 1 + the number
    of the subject, of which a scene shows none twice; `lines`, the line art of what is shown in its
    place, and `edges` of the picture, both white on black, uint8 [64, 64, 3], as hints are.

    Args:
        ref: "emoji_scenes", or with a split, "emoji_scenes:test"; `SPLITS` are all.
        caption, columns: as for `Folder`.
        seed: another one gives other scenes of the same subjects, as often.

    Raises:
        UserError: for a split or a column that is not there, or damaged artwork.
    """

    def __init__(
        self, ref: str = NAME, caption: str = "", columns: tuple[str, ...] = (), seed: int = 0
    ):
        self.ref, self.seed = ref, seed
        self.split = ref.removeprefix(NAME).removeprefix(":") or "train"
        if self.split not in SPLITS:
            raise UserError(f"{ref[:80]}: its splits are {', '.join(SPLITS)}")
        check_seed(seed)
        self._caption = caption
        self._pictures = [name for name in columns if name in PICTURES]
        there = self._render(self.scene(0), 0)
        for name in columns:
            if name not in there and name not in PICTURES:
                listed = ", ".join((*there, *PICTURES))
                raise UserError(f"{ref} has no column {name[:40]!r}; it has {listed}")
        examples.pick_caption(there, caption, ref)

    def __len__(self) -> int:
        return SPLITS[self.split].scenes

    def read(self, i: int, least: int | None = None) -> Example:
        if not 0 <= i < len(self):
            raise IndexError(f"{self.ref} has no scene {i}")
        example = self._render(self.scene(i), i)
        return example | {"caption": examples.pick_caption(example, self._caption, self.ref)}

    def size(self, i: int) -> tuple[int, int]:
        return SIDE, SIDE

    def name(self, i: int) -> str:
        return f"{self.ref}[{i}]"

    def fingerprint(self) -> dict[str, Any]:
        made = zlib.crc32(artwork.ARCHIVE.read_bytes())
        return super().fingerprint() | {"split": self.split, "seed": self.seed, "crc32": made}

    def scene(self, i: int) -> Scene:
        """What scene i shows, without drawing it."""
        rng = self._generator(i, 0)
        art = artwork.load()
        numbers = longtail.subjects(self.split, self.seed, i)
        style = artwork.STYLES[rng.integers(len(artwork.STYLES))]
        shapes = [art.cell(n, style).size for n in numbers]
        sides, corners, relations = layout.arrange(shapes, rng)
        sizes = tuple(layout.size_word(side) for side in sides)
        avoided = frozenset().union(*(alike(n, style) for n in numbers))
        colour = backgrounds.pick_colour(avoided, rng)
        pattern = backgrounds.pick_pattern(rng)
        shown = [art.subjects[n] for n in numbers]
        return Scene(
            subjects=numbers,
            style=style,
            colour=colour,
            pattern=pattern,
            caption=captions.caption(shown, sizes, relations, style, colour, pattern, rng),
            sizes=sizes,
            relations=relations,
            corners=corners,
            sides=sides,
            mirrored=tuple((rng.random(len(numbers)) < 0.5).tolist()),
        )

    def _generator(self, i: int, part: int) -> np.random.Generator:
        """Numbers for one part of scene i, which no other scene of any split has."""
        stream = SPLITS[self.split].number << 48 | part << 40 | i
        return np.random.Generator(np.random.Philox(key=[self.seed, stream]))

    def _render(self, scene: Scene, i: int) -> Example:
        art = artwork.load()
        image = backgrounds.paint(scene.colour, scene.pattern, self._generator(i, 1))
        segmentation = np.zeros((SIDE, SIDE), np.uint8)
        lines = np.zeros((SIDE, SIDE), np.uint8)
        boxes = []
        for number, side, (x, y), mirror in zip(
            scene.subjects, scene.sides, scene.corners, scene.mirrored
        ):
            sprite = art.sprite(number, scene.style, side)[:, :: -1 if mirror else 1]
            h, w = sprite.shape[:2]
            window = slice(y, y + h), slice(x, x + w)
            visible = drawing.composite(image[window], sprite)
            segmentation[window][visible] = number + 1
            boxes.append(drawing.box(visible, x, y))
            if "lines" in self._pictures:
                lines[window] = art.ink(number, (w, h))[:, :: -1 if mirror else 1]

        drawn = {
            "mask": lambda: segmentation > 0,
            "segmentation": lambda: segmentation,
            "edges": lambda: drawing.as_hint(drawing.edges(image)),
            "lines": lambda: drawing.as_hint(lines),
        }
        return {
            "image": image,
            "caption": scene.caption,
            "things": captions.things([art.subjects[n] for n in scene.subjects]),
            "boxes": np.array(boxes, np.float32) / SIDE,
            "phrases": [art.subjects[n].name for n in scene.subjects],
            "subject": np.array(scene.subjects, np.int32),
            "sizes": list(scene.sizes),
            "style": scene.style,
            "colour": scene.colour,
            "pattern": scene.pattern,
            "relations": list(scene.relations),
        } | {name: drawn[name]() for name in self._pictures}


def check_seed(seed: int) -> None:
    """UserError for a seed that no generator here takes."""
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed {seed} is not from 0 to 2**63 - 1")


@cache
def alike(subject: int, style: str) -> frozenset[str]:
    """Colours on which a subject is hard to see; line art is seen on all."""
    if style == "line art":
        return frozenset()
    mean = backgrounds.lab(artwork.load().colour(subject, style))
    shades = {name: backgrounds.lab(np.array(both)) for name, both in backgrounds.COLOURS.items()}
    away = {name: np.linalg.norm(both - mean, axis=1).min() for name, both in shades.items()}
    return frozenset(name for name, distance in away.items() if distance < CLEAR)

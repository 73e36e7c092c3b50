"""The artwork of emoji_scenes: its subjects, and a sprite of each in four styles at any size."""

import json
import zipfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from jaxgen.types import UserError

ARCHIVE = Path(__file__).parents[2] / "assets" / "emoji_scenes" / "artwork.zip"
SHEETS = {"flat": "flat.webp", "modern": "modern.webp", "3D": "3d.webp", "line art": "line.webp"}
VIEW_STYLES = tuple(SHEETS)
STYLES = ("flat", "3D", "line art")  # of scenes: small, modern is not told from 3D
REPAIR = "install jaxgen again, or write it anew with train/pack_emoji.py"
INK = 222  # levels of 255 by which the lines of the line art are darker than white
GROUPS = ("head", "middle", "tail", "held")


@dataclass(frozen=True)
class Subject:
    """What a scene can show.

    Attributes:
        name: in words, such as "red apple".
        article: "a ", "an ", or nothing before what has no number, such as "grapes".
        group: how often it is trained on, of `GROUPS`; held ones never are.
    """

    name: str
    article: str
    group: str


class Artwork:
    """Subjects by number, and their sprites, which are scaled once for each size.

    Args:
        path: the archive that `train/pack_emoji.py` wrote.

    Raises:
        UserError: one line, for an archive that is missing or damaged.
    """

    def __init__(self, path: Path = ARCHIVE):
        try:
            with zipfile.ZipFile(path) as archive:  # which checks the CRC of all that is read
                index = json.loads(archive.read("subjects.json"))
                self.side, columns = int(index["side"]), int(index["columns"])
                self.subjects = [Subject(**subject) for subject in index["subjects"]]
                self._art = {
                    style: self._cells(archive, member, columns) for style, member in SHEETS.items()
                }
        except FileNotFoundError:
            raise UserError(f"no file {path}: {REPAIR}") from None
        except Exception as error:  # zip, zlib, json and WebP each have their own
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path} is damaged ({reason[:100]}): {REPAIR}") from None
        self._sprites: dict[tuple[int, str, int], np.ndarray] = {}
        self._ink: dict[tuple[int, tuple[int, int]], np.ndarray] = {}

    def _cells(self, archive: zipfile.ZipFile, member: str, columns: int) -> list[Image.Image]:
        """The sprites of a sheet, premultiplied, each cut to what is visible."""
        with archive.open(member) as file, Image.open(file, formats=["WEBP"]) as sheet:
            pixels = sheet.convert("RGBA").convert("RGBa")
        rows = -(-len(self.subjects) // columns)
        if pixels.size != (columns * self.side, rows * self.side):
            raise ValueError(f"{member} is {pixels.width}x{pixels.height}")
        cells = []
        for i in range(len(self.subjects)):
            y, x = i // columns * self.side, i % columns * self.side
            cell = pixels.crop((x, y, x + self.side, y + self.side))
            cells.append(cell.crop(cell.getbbox()))  # it is at the upper left
        return cells

    def number(self, name: str) -> int:
        """The number of the subject of that name; UserError where there is none."""
        for i, subject in enumerate(self.subjects):
            if subject.name == name:
                return i
        raise UserError(f"no subject {name[:80]!r} in emoji_scenes; 'red apple' is one")

    def group(self, *names: str) -> list[int]:
        """The numbers of the subjects of some groups."""
        return [i for i, subject in enumerate(self.subjects) if subject.group in names]

    def cell(self, subject: int, style: str) -> Image.Image:
        """The artwork as it is stored: Pillow's "RGBa", the longer side 64 pixels."""
        return self._art[style][subject]

    def colour(self, subject: int, style: str) -> np.ndarray:
        """The mean colour of what is visible, float [3], 0 to 255."""
        pixels = np.asarray(self._art[style][subject], np.float64)
        return 255 * pixels[..., :3].sum((0, 1)) / pixels[..., 3].sum()

    def sprite(self, subject: int, style: str, side: int) -> np.ndarray:
        """Premultiplied uint8 [h, w, 4] whose longer side is `side`; not to be written to."""
        key = subject, style, side
        if key not in self._sprites:
            cell = self._art[style][subject]
            scale = side / max(cell.size)
            size = max(1, round(cell.width * scale)), max(1, round(cell.height * scale))
            self._sprites[key] = scaled(cell, size)
        return self._sprites[key]

    def ink(self, subject: int, size: tuple[int, int]) -> np.ndarray:
        """How dark the line art is, uint8 [h, w], fitted to a sprite of that width and height."""
        key = subject, size
        if key not in self._ink:
            line = scaled(self._art["line art"][subject], size)
            dark = (line[..., 3] - line[..., 0]).astype(np.uint16)
            self._ink[key] = np.minimum(dark * 255 // INK, 255).astype(np.uint8)
        return self._ink[key]


def scaled(art: Image.Image, size: tuple[int, int]) -> np.ndarray:
    """ "RGBa" artwork at another size, uint8 [h, w, 4]; no colour is stronger than its alpha."""
    pixels = np.array(art.resize(size, Image.Resampling.LANCZOS))
    np.minimum(pixels, pixels[..., 3:], out=pixels)  # Lanczos overshoots
    return pixels


@lru_cache(maxsize=1)
def load() -> Artwork:
    """The artwork of the package, read once."""
    return Artwork()

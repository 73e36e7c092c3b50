"""What a source of training data is, and how the pictures of its examples are read."""

import errno
import io
import time
import zlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from jaxgen.data import images
from jaxgen.types import UserError

Example = dict[str, Any]
Picture = Path | bytes | np.ndarray  # a file, its content, or pixels

MASKS = ("mask",)  # read as bool [H, W], white is True
LABELS = ("segmentation",)  # read as integers [H, W]
NUMBERS = ("1", "L", "P", "I", "I;16")  # Pillow's modes of pixels that may be labels
PHOTOS = ("image", "original", "input_image", "edited")  # what is drawn, or edited
PICTURES = (*PHOTOS, *MASKS, *LABELS, "hint")
CAPTIONS = ("text", "caption")  # where no column is named, the first of these that is there
ENDINGS = ("_file_name", "_image")  # the column `hint_file_name` is the picture `hint`
EXIF_ORIENTATION = 0x0112
PNG_EXIF = {"exif", "Raw profile type exif", "XML:com.adobe.xmp"}  # where a PNG's header keeps it
# Errors of the one file that is read. Others, as of a disk that fails or a machine that runs out of
# memory or of open files, would be those of the next file, too. Decoders give no number.
OF_A_FILE = {
    None,
    *(errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM),
    *(errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EOVERFLOW),
}
PAUSES = (0.2, 2.0, 10.0)  # seconds before it is tried again
SAMPLED = 16  # examples of a source that its fingerprint reads
T = TypeVar("T")


class BadExample(ValueError):
    """An example that cannot be used; training goes on with another one.

    Attributes:
        name: what the user can look for: a file, or a record's number.
        reason: half a sentence.
    """

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Unreadable(UserError):
    """A disk or a machine that fails, whichever example it was asked for."""


class Source(ABC):
    """Examples by number, from 0. Small to pickle, and read by many threads at once.

    Attributes:
        ref: what the user called it.
    """

    ref: str

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, i: int, least: int | None = None) -> Example:
        """Example i: `image` uint8 [H, W, 3], `caption`, and the further columns.

        Args:
            least: where the shorter side may be reduced to while decoding; JPEG files are read
                several times faster. Other pictures come at their full size.

        Raises:
            BadExample: for what cannot be read.
        """

    @abstractmethod
    def size(self, i: int) -> tuple[int, int]:
        """Width and height of image i, upright, without decoding it; raises BadExample."""

    @abstractmethod
    def name(self, i: int) -> str:
        """What to call example i in the log."""

    def fingerprint(self) -> dict[str, Any]:
        """What tells this source from another one, wherever the files lie; reads some examples."""
        return {"kind": type(self).__name__.lower(), "length": len(self)}

    def __getitem__(self, i: int) -> Example:
        return self.read(i)


def patiently(read: Callable[..., T], *arguments: Any) -> T:
    """What `read` returns; tried some times more where it is the machine that fails."""
    for pause in PAUSES:
        try:
            return read(*arguments)
        except Unreadable:
            time.sleep(pause)
    return read(*arguments)


def crc_of_some(source: Source, content: Callable[[int], bytes]) -> int:
    """A checksum of the first example, the last and some between; a bad one counts as nothing."""

    def read(i: int) -> bytes:
        with guard(source.name(i)):
            return content(i)

    crc, last = 0, len(source) - 1
    for i in sorted({last * k // (SAMPLED - 1) for k in range(SAMPLED)}):
        with suppress(BadExample):
            crc = zlib.crc32(patiently(read, i), crc)
    return crc


def printable(text: str) -> str:
    """A name from outside, fit for one line of a log or a terminal."""
    return "".join(c if c.isprintable() else "?" for c in text)


def pick_caption(record: Mapping[str, Any], column: str, where: str) -> str:
    """The caption of a record: its column `column`, or where that is "", one of `CAPTIONS`.

    Raises:
        UserError: that names the columns there are.
    """
    for name in (column,) if column else CAPTIONS:
        if isinstance(record.get(name), str):
            return record[name]
        if name in record:
            raise UserError(f"{where}: {name!r} is {str(record[name])[:40]!r}, which is no text")
    wanted = repr(column) if column else " or ".join(map(repr, CAPTIONS))
    raise UserError(f"{where} has no column {wanted}; it has {_listed(record)}")


def pick_pictures(record: Mapping[str, Any], columns: Iterable[str], where: str) -> dict[str, str]:
    """The pictures among the `columns` asked for -> the columns that hold them.

    Raises:
        UserError: for a column that is not there; it names those that are.
    """
    found = {}
    for name in columns:
        spelled = [name, *(name + ending for ending in ENDINGS)]
        there = [column for column in spelled if column in record]
        if not there:
            raise UserError(f"{where} has no column {name!r}; it has {_listed(record)}")
        if is_picture(name) or there[0] != name:
            found[name] = there[0]
    return found


def _listed(record: Mapping[str, Any]) -> str:
    return ", ".join(printable(str(key))[:40] for key in list(record)[:20]) or "none"


def is_picture(column: str) -> bool:
    """Whether a column holds pictures: these are read only where they are asked for."""
    return column in PICTURES or column.endswith(ENDINGS)


def decode(picture: Picture, column: str, name: str, least: int | None = None) -> np.ndarray:
    """A picture as its column wants it: bool [H, W], integers [H, W], or uint8 [H, W, 3].

    Args:
        picture: a file is read as `images.read_image` does; pixels are checked.
        name: of the example, for the error.
        least: as in `Source.read`; masks and labels are never reduced.

    Raises:
        BadExample: for what is no picture, or damaged, or too large.
    """
    if isinstance(picture, np.ndarray):
        return _checked(picture, column, name)
    with opened(picture, name) as file:
        if least and column not in (*MASKS, *LABELS) and file.mode == "RGB":
            file.draft("RGB", (least, least))  # neither side gets shorter than that
        ImageOps.exif_transpose(file, in_place=True)
        file.load()
        if column in LABELS:
            if file.format == "JPEG":
                raise BadExample(name, f"{column!r} is a JPEG, which blurs the numbers of labels")
            if file.mode not in NUMBERS:
                raise BadExample(name, f"{column!r} holds colours, not the numbers of labels")
            return np.array(file)
        # Lines of hints are on black, and nothing is drawn where a mask is transparent.
        background = "white" if column in PHOTOS else "black"
        plain = file.mode == "RGB" and not file.has_transparency_data
        rgb = np.array(file) if plain else images.to_rgb(file, background)[0]
        return np.asarray(Image.fromarray(rgb).convert("L")) >= 128 if column in MASKS else rgb


def _checked(pixels: np.ndarray, column: str, name: str) -> np.ndarray:
    """Pixels that a source stores as an array, in the form of `decode`."""
    flat = column in (*MASKS, *LABELS)
    if flat and pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[..., 0]
    if pixels.size and flat and pixels.ndim == 2 and pixels.dtype.kind in "bui":
        if column in LABELS:
            return pixels
        return pixels >= (128 if pixels.max() > 1 else 1)
    colour = pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (1, 3)
    if pixels.size and not flat and colour:
        return np.repeat(pixels, 3 // pixels.shape[2], axis=2)
    raise BadExample(name, f"{column!r} is {pixels.dtype} {list(pixels.shape)}, not a picture")


def size(picture: Picture, name: str) -> tuple[int, int]:
    """Width and height of a picture, upright, from its header alone.

    A PNG file may say behind its pixels how it stands; that is not looked for.
    """
    if isinstance(picture, np.ndarray):
        height, width = _checked(picture, "image", name).shape[:2]
        return width, height
    with opened(picture, name) as file:
        width, height = file.size
        # Of a PNG without any, Pillow decodes all pixels to look behind them.
        known = file.format != "PNG" or PNG_EXIF & file.info.keys()
        turned = known and file.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
        return (height, width) if turned else (width, height)


@contextmanager
def guard(name: str) -> Iterator[None]:
    """Whatever goes wrong inside is a BadExample: libraries raise a dozen types at damaged data.

    Unless it is the machine that fails: that is Unreadable.
    """
    try:
        yield
    except (BadExample, Unreadable):
        raise
    except UnidentifiedImageError:
        raise BadExample(name, f"none of {', '.join(images.FORMATS)}, or damaged") from None
    except Exception as error:
        reason = printable(" ".join(str(error).split()) or type(error).__name__)[:200]
        if isinstance(error, MemoryError) or getattr(error, "errno", None) not in OF_A_FILE:
            raise Unreadable(f"cannot read {name}: {reason}") from None
        raise BadExample(name, reason) from None


@contextmanager
def opened(picture: Path | bytes, name: str) -> Iterator[Image.Image]:
    """A picture file whose header is read, under `guard`."""
    with guard(name):
        if isinstance(picture, Path) and not picture.is_file():
            raise BadExample(name, "no such file")
        source = picture if isinstance(picture, Path) else io.BytesIO(picture)
        with Image.open(source, formats=images.FORMATS) as file:
            width, height = file.size
            if width * height > images.MAX_PIXELS:
                limit = f"the limit is {images.MAX_PIXELS} pixels"
                raise BadExample(name, f"{width}x{height} is too large, {limit}")
            yield file

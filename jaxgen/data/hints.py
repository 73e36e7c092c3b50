"""Hints: the pictures that ControlNets follow."""

import difflib
import math
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from jaxgen.data import annotators
from jaxgen.data.images import read_image, resize, warn_once
from jaxgen.types import UserError

# Colours at most of a picture that is taken for a map of labels, and greys, if there are no others:
# of a depth, or the smoothed lines of a drawing, there are more.
LABELS, GREYS = 256, 8
CHANNELS = (3, 1)  # of hints that a ControlNet may read


@dataclass(frozen=True, eq=False)
class Hint:
    """What one ControlNet follows.

    Attributes:
        picture: uint8 [H, W, 3], of what the network learned to read (edges, labels, a pose), or
            [P, H, W, 3], one for each prompt; photos, if there is an annotator.
        scale: of what it adds; 0 is without it.
        span: the part of the run, as fractions, in which it acts; a step that is only partly within
            is not.
        name: for records.
        annotator: what makes the hint of a photo: canny, hough, soft, scribble, depth, normal, hed
            or pose.
    """

    picture: np.ndarray
    scale: float = 1.0
    span: tuple[float, float] = (0.0, 1.0)
    name: str = ""
    annotator: str = ""

    @property
    def strength(self) -> str:
        """Scale and span, for records: @0.8 from 0 to 0.5."""
        whole = self.span == (0.0, 1.0)
        return f"@{self.scale:g}" + ("" if whole else f" from {self.span[0]:g} to {self.span[1]:g}")

    def check(self, prompts: int) -> None:
        """UserError for what is no hint, or not one for each of so many prompts."""
        picture = self.picture
        if not isinstance(picture, np.ndarray):
            kind = type(picture).__name__
            raise UserError(f"a hint is a {kind}, not a numpy array uint8 [H, W, 3]")
        if picture.dtype != np.uint8 or picture.ndim not in (3, 4) or picture.shape[-1] != 3:
            found = f"{picture.dtype} {list(picture.shape)}"
            raise UserError(f"a hint is {found}, and must be uint8 [H, W, 3]")
        if picture.ndim == 4 and len(picture) != prompts:
            raise UserError(f"there are {len(picture)} hints for {prompts} prompts")
        if not isinstance(self.scale, int | float | np.number) or not math.isfinite(self.scale):
            raise UserError(f"the scale of a control is {self.scale!r}, not a finite number")
        if abs(self.scale) > 1e4:
            raise UserError(f"the scale of a control, {self.scale}, is too large to mean anything")
        try:
            low, high = map(float, self.span)
        except (TypeError, ValueError):
            raise UserError(f"control_range {self.span!r} is not two numbers") from None
        if not 0 <= low < high <= 1:
            raise UserError(f"control_range {low:g},{high:g} is not 0 <= from < to <= 1")
        if self.annotator and self.annotator not in annotators.ANNOTATORS:
            names = ", ".join(annotators.ANNOTATORS)
            raise UserError(f"no annotator {self.annotator!r} of photos; there are {names}")

    def at(self, width: int, height: int, channels: int = 3) -> "Hint":
        """As a ControlNet reads it, at a size; what is resized is said once.

        A photo is resized before it is annotated, as in training: so lines are as wide as those
        that the network learned from, whatever the photo's size.
        """
        name = self.name or "a hint"
        if not self.annotator:
            return replace(self, picture=fit(self.picture, width, height, channels, name))
        annotate = annotators.ANNOTATORS[self.annotator]
        photos = self.picture if self.picture.ndim == 4 else self.picture[None]
        drawn = [annotate(fit_photo(photo, width, height, name)) for photo in photos]
        picture = np.stack(drawn) if self.picture.ndim == 4 else drawn[0]
        return replace(self, picture=fit(picture, width, height, channels), annotator="")


def fit(hint: np.ndarray, width: int, height: int, channels: int = 3, name: str = "") -> np.ndarray:
    """A hint, uint8 [..., H, W, 3], at a size and with the channels that a ControlNet reads.

    Maps of labels (`is_labels`) are resized to the nearest pixel, so that no colour appears that
    stands for nothing; other hints by Lanczos, as diffusers resizes all.

    Args:
        name: under which it is said, once, that the hint is resized; without one nothing is.

    Raises:
        UserError: for channels that no picture has.
    """
    if hint.ndim == 4:
        return np.stack([fit(one, width, height, channels, name) for one in hint])
    if hint.shape[:2] != (height, width):
        _say_resized(hint, width, height, name)
        near = Image.Resampling.NEAREST
        if is_labels(hint):
            hint = np.array(Image.fromarray(hint).resize((width, height), near))
        else:
            hint = resize(hint, width, height)
    if channels == 3:
        return hint
    if channels == 1:
        return np.asarray(Image.fromarray(hint).convert("L"))[..., None]
    raise UserError(f"the ControlNet reads hints of {channels} channels; pictures have 3 or 1")


def fit_photo(photo: np.ndarray, width: int, height: int, name: str = "") -> np.ndarray:
    """A photo, uint8 [H, W, 3], at a size; said once under a name."""
    if photo.shape[:2] != (height, width):
        _say_resized(photo, width, height, name)
    return resize(photo, width, height)


def _say_resized(picture: np.ndarray, width: int, height: int, name: str) -> None:
    if name:
        found = "{1}x{0}".format(*picture.shape)
        warn_once(f"{name} is resized from {found} to {width}x{height}")


def read(text: str, span: tuple[float, float] = (0.0, 1.0), ref: str = "") -> Hint:
    """The hint that `[ANNOTATOR:]FILE[@SCALE]` names, under the ControlNet `ref`.

    Raises:
        UserError: for what is no picture, an annotator that is not there, and a scale that is no
            number.
    """
    annotator, file, scale = _source(text)
    name = f"{annotator}:{file}" if annotator else file
    name = f"{ref}={name}" if ref else name
    if annotator in annotators.OF_FILES:
        return Hint(annotators.OF_FILES[annotator](Path(file)), scale, span, name)
    background = "white" if annotator else "black"  # of photos, and of lines
    return Hint(read_image(Path(file), background), scale, span, name, annotator)


def _source(text: str) -> tuple[str, str, float]:
    """Annotator, file and scale; what is a file is read as one, whatever its name holds."""
    name, colon, inner = text.partition(":")
    if not colon or _is_file(text) or _is_file(text.rpartition("@")[0]):
        return "", *_scaled(text)
    file, scale = _scaled(inner)
    if name in annotators.NAMES:
        return name, file, scale
    if _is_file(file):
        close = difflib.get_close_matches(name, annotators.NAMES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        names = ", ".join(annotators.NAMES)
        raise UserError(f"{text}: no annotator {name!r} (there are {names}){hint}")
    return "", *_scaled(text)


def _scaled(text: str) -> tuple[str, float]:
    """FILE[@SCALE], split at the last @ unless all of it is a file."""
    file, at, number = text.rpartition("@")
    if not at or _is_file(text):
        return text, 1.0
    try:
        scale = float(number)
    except ValueError:
        scale = math.nan
    if not math.isfinite(scale):
        raise UserError(
            f"the scale {number!r} after the @ of {text} is not a number, and there is no such file"
        )
    return file, scale


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a name too long, a folder that is closed
        return False


def is_labels(hint: np.ndarray) -> bool:
    """Whether a picture, uint8 [H, W, 3], is a map of labels: of few colours, or very few greys.

    One in black and white alone is not: it may be a drawing, whose lines the nearest pixel breaks.
    """
    packed = hint.astype(np.uint32) @ np.array([1 << 16, 1 << 8, 1], np.uint32)
    colours = np.unique(packed)
    if all(c >> 16 == (c >> 8) & 255 == c & 255 for c in colours.tolist()):
        return len(colours) <= GREYS and not np.isin(colours, (0, 0xFFFFFF)).all()
    return len(colours) <= LABELS

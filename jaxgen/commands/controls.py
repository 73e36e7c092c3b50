"""`--control REF=[ANNOTATOR:]FILE[@SCALE]`, read."""

import difflib
import math
from collections.abc import Sequence
from pathlib import Path

from jaxgen import terminal
from jaxgen.data import annotators
from jaxgen.data.hints import Hint
from jaxgen.data.images import read_image
from jaxgen.types import UserError


def parse(controls: Sequence[str], ranges: Sequence[str]) -> list[tuple[str, Hint]]:
    """The ControlNets that the options name, and what each is to follow.

    Raises:
        UserError: for options of another form, files that are no pictures, and annotators that are
            not there.
    """
    if ranges and not controls:
        raise UserError("--control-range has no effect without --control")
    if len(ranges) > 1 and len(ranges) != len(controls):
        raise UserError(
            f"--control-range is given {len(ranges)} times for {len(controls)} of --control; "
            "give one for all, or one for each"
        )
    spans = [terminal.read_pair(text, "--control-range") for text in ranges] or [(0.0, 1.0)]
    spans *= len(controls) if len(spans) == 1 else 1
    return [_control(text, span) for text, span in zip(controls, spans)]


def _control(text: str, span: tuple[float, float]) -> tuple[str, Hint]:
    ref, equals, rest = text.partition("=")
    if not equals or not ref or not rest:
        raise UserError(f"--control {text} is not REF=FILE, as in edges=drawing.png@0.8")
    annotator, file, scale = _source(rest)
    path = Path(file)
    picture = annotators.annotate(annotator, path) if annotator else read_image(path)
    name = f"{ref}={annotator}:{file}" if annotator else f"{ref}={file}"
    return ref, Hint(picture, scale, span, name)


def _source(rest: str) -> tuple[str, str, float]:
    """Annotator, file and scale of `[ANNOTATOR:]FILE[@SCALE]`; what is a file is read as one."""
    name, colon, inner = rest.partition(":")
    if not colon or _is_file(rest) or _is_file(rest.rpartition("@")[0]):
        return "", *_scaled(rest)
    file, scale = _scaled(inner)
    if name in annotators.NAMES:
        return name, file, scale
    if _is_file(file):
        close = difflib.get_close_matches(name, annotators.NAMES, 1)
        hint = f"; did you mean {close[0]}?" if close else ""
        names = ", ".join(annotators.NAMES)
        raise UserError(f"--control: no annotator {name!r} (there are {names}){hint}")
    return "", *_scaled(rest)


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
        raise UserError(f"--control: the scale {number!r} after the @ of {text} is not a number")
    return file, scale


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except OSError:  # a name too long, a folder that is closed
        return False

"""`--control REF=[ANNOTATOR:]FILE[@SCALE]`, read."""

from collections.abc import Sequence

from jaxgen import terminal
from jaxgen.data import hints
from jaxgen.data.hints import Hint
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
    try:
        return ref, hints.read(rest, span, ref)
    except UserError as error:
        raise UserError(f"--control: {error}") from None

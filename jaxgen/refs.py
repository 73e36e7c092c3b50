"""What a reference names: a folder, a file, a hub id, or something that came with the package."""

import difflib
from pathlib import Path

from jaxgen.types import UserError
from jaxgen.weights import hub

ASSETS = Path(__file__).parent / "assets"
EMBEDDED = ASSETS / "mini"  # a model folder like any other
EMBEDDED_CLIP = EMBEDDED / "clip"  # an image encoder, and the text encoder that goes with it
CONTROLS = ASSETS / "controls"  # the embedded model's ControlNets, by name


def find(ref: str | Path | None, variant: str = "") -> Path:
    """The folder or file of a model, fetched from the hub if `ref` is an id."""
    path = Path(EMBEDDED if ref is None else ref)
    if str(ref) == EMBEDDED.name and not (path / "model_index.json").is_file():
        return EMBEDDED
    return _there(path) or _fetched(str(ref), path, "model", variant)


def find_control(ref: str | Path, variant: str = "") -> Path:
    """The folder or file of a ControlNet: the embedded model's by name, any other as a model."""
    path = Path(ref)
    embedded = CONTROLS / path.name
    if str(ref) == path.name and (embedded / "config.json").is_file() and not path.exists():
        return embedded
    return _there(path) or _fetched(str(ref), path, "ControlNet", variant)


def _there(path: Path) -> Path | None:
    try:
        return path if path.exists() else None
    except OSError as error:
        raise UserError(f"no folder or file {str(path)[:80]}: {error.strerror}") from None


def _fetched(ref: str, path: Path, what: str, variant: str = "") -> Path:
    if hub.is_id(ref) and not path.parent.is_dir():
        return hub.fetch(ref, variant, hub.MODEL if what == "model" else hub.PART)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if what == "ControlNet" and ref == path.name and CONTROLS.is_dir():
        beside += [p.name for p in CONTROLS.iterdir()]
    close = difflib.get_close_matches(path.name, beside, 1)
    hint = f"; did you mean {path.parent / close[0]}?" if close else ""
    raise UserError(f"no {what} folder or file {path}{hint}")

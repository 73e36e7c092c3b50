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
    return control_here(ref) or _fetched(str(ref), Path(ref), "ControlNet", variant)


def control_here(ref: str | Path) -> Path | None:
    """As `find_control`, of this machine; None where nothing is there, as for hub ids."""
    path = Path(ref)
    embedded = CONTROLS / path.name
    mine = path.is_file() or any((path / name).exists() for name in ("config.json", "controlnet"))
    if str(ref) == path.name and (embedded / "config.json").is_file() and not mine:
        return embedded
    return _there(path)


def is_remote(ref: str | Path) -> bool:
    """Whether what is not on this machine may be a hub id, and not a path with a mistake."""
    return hub.is_id(str(ref)) and not Path(ref).parent.is_dir()


def _there(path: Path) -> Path | None:
    try:
        return path if path.exists() else None
    except OSError as error:
        raise UserError(f"no folder or file {str(path)[:80]}: {error.strerror}") from None


def _fetched(ref: str, path: Path, what: str, variant: str = "") -> Path:
    if is_remote(ref):
        return hub.fetch(ref, variant, hub.MODEL if what == "model" else hub.PART)
    beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    if what == "ControlNet" and ref == path.name and CONTROLS.is_dir():
        beside += [p.name for p in CONTROLS.iterdir() if p.is_dir()]
    close = difflib.get_close_matches(path.name, beside, 1)
    may_be = "name a folder, a .safetensors file, or organisation/name on the hub"
    hint = f"did you mean {path.parent / close[0]}?" if close else may_be
    raise UserError(f"no {what} folder or file {path}; {hint}")

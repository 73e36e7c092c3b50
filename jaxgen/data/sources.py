"""Opens what a config names as its source of training data."""

import difflib
import glob
from pathlib import Path

from jaxgen.data.cached import Cached, describe
from jaxgen.data.examples import BadExample, Example, Source
from jaxgen.data.folder import METADATA, Folder, example_line
from jaxgen.data.records import Records, write_records
from jaxgen.data.tfds import PREFIX, Tfds
from jaxgen.types import UserError

__all__ = [
    "BadExample",
    "Cached",
    "Example",
    "Folder",
    "Records",
    "Source",
    "Tfds",
    "open_source",
    "write_records",
]
PREPARED = "dataset_info.json"  # what tensorflow-datasets writes beside its records
RECORDS = "*array_record*"  # ours end so, and those of tensorflow-datasets have a number behind it
SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm"}
MOST_LISTED = 10_000  # entries of a folder that are looked at for an error


def open_source(ref: str, caption: str = "", columns: tuple[str, ...] = ()) -> Source:
    """A folder, ArrayRecord files, a cache, a tensorflow-datasets name, or our own scenes.

    Args:
        ref: the folder; an ArrayRecord file, a folder of them, or a pattern such as
            "shards/*.array_record"; "tfds:NAME:SPLIT", as `Tfds` says; or "emoji_scenes" or
            "emoji_scenes:SPLIT", as `EmojiScenes` does.
        caption: the column of captions; "" takes `text`, or else `caption`.
        columns: further columns that each example must have; pictures among them are read.

    Raises:
        UserError: one line that says what is missing and what to do.
    """
    if not ref:
        raise UserError("no source of training data is named: set data.source")
    if ref.startswith(PREFIX):
        return Tfds(ref, caption, columns)
    if ref.split(":")[0] == "emoji_scenes":  # a folder of that name is ./emoji_scenes
        from jaxgen.data.emoji_scenes.scenes import (
            EmojiScenes,  # its artwork is read where it is used
        )

        return EmojiScenes(ref, caption, columns)
    if "://" in ref:
        raise UserError(f"{ref[:200]}: data are read as files; mount it, and name the folder")
    path = Path(ref)
    try:
        if (path / METADATA).is_file():
            return Folder(path, caption, columns)
        if (description := describe(ref)) is not None:
            return Cached(ref, description)
        files = _record_files(path)
        if not files or (path / PREPARED).is_file():
            raise UserError(_explain(path))
        return Records(ref, files, caption, columns)
    except OSError as error:
        raise UserError(f"cannot read {ref[:200]}: {error.strerror or error}") from None


def _record_files(path: Path) -> list[Path]:
    """The ArrayRecord files that a path names: itself, those in it, or those of a pattern."""
    if path.is_dir():
        return sorted(p for p in path.glob(RECORDS) if not p.name.startswith("."))
    if path.is_file():
        return [path] if "array_record" in path.name else []
    return sorted(Path(name) for name in glob.glob(str(path)) if Path(name).is_file())


def _explain(path: Path) -> str:
    """Why a path is no source, and what would make it one."""
    if path.is_file():
        return f"{path} is a file, not a folder of pictures or an ArrayRecord file"
    if not path.exists():
        beside = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, 1)
        hint = f"; did you mean {path.parent / close[0]}?" if close else ""
        return f"no folder or file {path}{hint}"
    names = [p.name for p, _ in zip(path.iterdir(), range(MOST_LISTED))]
    if not names:
        return f"{path} is empty"
    if "samples.jsonl" in names:
        return f"{path} has no {METADATA}; rename its samples.jsonl to train on these samples"
    if PREPARED in names:
        return f"{path} was prepared by tensorflow-datasets: write {PREFIX}{path}:train"
    pictures = sum(Path(name).suffix.lower() in SUFFIXES for name in names)
    return (
        f"{path} has no {METADATA} beside its {pictures} pictures; "
        f"write one, with a line for each, such as {example_line()}"
    )

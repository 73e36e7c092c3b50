"""Writes examples of any source as an image folder, which `Folder` reads back the same."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from jaxgen import locks
from jaxgen.data.examples import Example, Source
from jaxgen.data.folder import METADATA
from jaxgen.types import UserError


def export(source: Source, out: Path, count: int, progress: bool = True) -> Path:
    """Writes the first `count` examples to a folder, all or nothing.

    Pictures become PNG files: `00000.png`, and those of a further column, such as `mask`, in a
    folder of its name, for the column `mask_file_name`. The caption becomes `text`.

    Args:
        out: a new or empty folder.
        progress: whether a bar is shown.

    Raises:
        UserError: for a count that the source does not have, and where nothing can be written.
    """
    if not 1 <= count <= len(source):
        raise UserError(f"count {count} is not from 1 to {len(source)}, which {source.ref} has")
    with (
        locks.whole(out, METADATA) as scratch,
        (scratch / METADATA).open("w", encoding="utf-8") as file,
    ):
        for i in tqdm(range(count), desc="writing", disable=not progress):
            line = _write(scratch, f"{i:05}.png", source.read(i))
            file.write(json.dumps(line, ensure_ascii=False) + "\n")
    return out.resolve()


def _write(folder: Path, name: str, example: Example) -> dict[str, Any]:
    """Writes the pictures of an example; the line that names them."""
    line: dict[str, Any] = {"file_name": name, "text": example["caption"]}
    for column, value in example.items():
        if column == "image":
            _save(folder / name, value)
        elif _is_picture(value):
            _save(folder / column / name, value)
            line[f"{column}_file_name"] = f"{column}/{name}"
        elif column not in ("caption", "text", "file_name"):
            line[column] = value.tolist() if isinstance(value, np.ndarray) else value
    return line


def _is_picture(value: Any) -> bool:
    return isinstance(value, np.ndarray) and value.ndim >= 2 and value.dtype in (bool, np.uint8)


def _save(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)

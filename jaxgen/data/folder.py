"""Image folders: pictures beside a `metadata.jsonl` of one JSON object per line."""

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from jaxgen.data import examples
from jaxgen.data.examples import BadExample, Example, Source
from jaxgen.types import UserError

METADATA = "metadata.jsonl"
MAX_LINE = 1 << 20
BOM = b"\xef\xbb\xbf"


class Folder(Source):
    """A folder of pictures and its `metadata.jsonl`: `file_name`, `text`, and further columns.

    Every line is checked once, at the start; then only its place in the file is kept: 16 bytes of
    memory for each, however many there are.

    Args:
        path: the folder.
        caption: the column of captions; "" takes `text`, or else `caption`.
        columns: further columns that each line must have. Those that name pictures, such as
            `mask`, `hint_file_name` or `edited`, are read; all that are not asked for are not.
        listing: the name of the list, where it is another one of the same kind.

    Raises:
        UserError: for the first line that is damaged, lacks a column, or leaves the folder.
    """

    def __init__(
        self,
        path: Path,
        caption: str = "",
        columns: tuple[str, ...] = (),
        listing: str = METADATA,
    ):
        self.ref = str(path)
        self._root = path.resolve()
        self._metadata = self._root / listing
        self._caption = caption
        self._columns = columns
        self._crc = 0
        places = []
        for number, place, line in self._lines():
            self._check(self._parse(line, number), f"{path / listing}: line {number}")
            self._crc = zlib.crc32(line, self._crc)
            places.append((place, place + len(line)))
        if not places:
            raise UserError(f"{path / listing} is empty; it should have one line for each picture")
        self._places = np.array(places, np.int64)

    def _lines(self) -> Iterator[tuple[int, int, bytes]]:
        """Number from 1, place in the file and content of each line that is not blank."""
        place = 0
        try:
            with self._metadata.open("rb") as file:
                for number, line in enumerate(iter(lambda: file.readline(MAX_LINE + 1), b""), 1):
                    if len(line) > MAX_LINE:
                        raise UserError(
                            f"{self._metadata}: line {number} is longer than {MAX_LINE >> 10} KiB"
                        )
                    bom = len(BOM) if number == 1 and line.startswith(BOM) else 0
                    if line[bom:].strip():
                        yield number, place + bom, line[bom:]
                    place += len(line)
        except OSError as error:
            raise UserError(f"cannot read {self._metadata}: {error.strerror or error}") from None

    def _parse(self, line: bytes, number: int) -> dict[str, Any]:
        where = f"{self._metadata}: line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else error
            raise UserError(f"{where} is not valid JSON: {reason}") from None
        if not isinstance(record, dict):
            raise UserError(f"{where} is not a JSON object, such as {example_line()}")
        return record

    def _check(self, record: dict[str, Any], where: str) -> None:
        """Refuses a record that lacks a column, or whose pictures lie elsewhere."""
        if "file_name" not in record:
            raise UserError(f"{where} has no column 'file_name', such as {example_line()}")
        examples.pick_caption(record, self._caption, where)
        pictures = examples.pick_pictures(record, self._columns, where)
        for column in ("file_name", *pictures.values()):
            name = record[column]
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"{where}: {column!r} is {str(name)[:40]!r}, not the name of a file"
                )
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise UserError(f"{where}: {name[:80]!r} is not inside the folder")

    def __len__(self) -> int:
        return len(self._places)

    def fingerprint(self) -> dict[str, Any]:
        def content(i: int) -> bytes:
            return self._file(self._record(i)["file_name"]).read_bytes()

        # Pictures count, too: of one `metadata.jsonl` there may be large ones and small ones.
        some = examples.crc_of_some(self, content)
        return super().fingerprint() | {"crc32": self._crc, "some_pictures": some}

    def _record(self, i: int) -> dict[str, Any]:
        start, stop = self._places[i].tolist()
        with examples.guard(self._shown(f"{self._metadata.name}, picture {i}")):
            with self._metadata.open("rb") as file:
                file.seek(start)
                record = json.loads(file.read(stop - start))
            self._check(record, self._metadata.name)  # it may have changed since
            return record

    def _file(self, name: str) -> Path:
        """The file of that name, refused where a symbolic link leads out of the folder."""
        with examples.guard(self._shown(name)):
            path = (self._root / name).resolve()
            if not path.is_relative_to(self._root):
                raise BadExample(self._shown(name), "a link leads out of the folder")
            return path

    def _shown(self, name: str) -> str:
        return examples.printable(f"{self.ref}/{name}")

    def read(self, i: int, least: int | None = None) -> Example:
        record = self._record(i)
        caption = examples.pick_caption(record, self._caption, self._metadata.name)
        found = {"image": "file_name"}
        found |= examples.pick_pictures(record, self._columns, self._metadata.name)
        example = {k: v for k, v in record.items() if not examples.is_picture(k)}
        for column, key in found.items():
            name = record[key]
            example[column] = examples.decode(self._file(name), column, self._shown(name), least)
        return example | {"caption": caption}

    def size(self, i: int) -> tuple[int, int]:
        record = self._record(i)
        width, height = record.get("width"), record.get("height")
        if type(width) is int and type(height) is int and min(width, height) > 0:
            return width, height
        name = record["file_name"]
        return examples.size(self._file(name), self._shown(name))

    def name(self, i: int) -> str:
        return self._shown(self._record(i)["file_name"])


def add_line(path: Path, record: Mapping[str, Any]) -> None:
    """Adds a record to a list. Where that fails, on a full disk, the list stays one of whole lines.

    Half a surrogate pair, from a bad argument, has no UTF-8 and becomes a question mark.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("a", encoding="utf-8", errors="replace") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
    except OSError:
        with contextlib.suppress(OSError):
            os.truncate(path, before)
        raise


def example_line() -> str:
    """A line of a `metadata.jsonl`, to show in an error."""
    return '{"file_name": "red-fox.jpg", "text": "a red fox in snow"}'

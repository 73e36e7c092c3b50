"""ArrayRecord files of training examples: random access at the speed of the disk.

A record is one example as the bytes of a safetensors file. Arrays are its tensors. A `bytes` value,
such as a picture's encoded file, is a uint8 tensor whose name is listed under `bytes`; text,
numbers and lists of them are under `values`. Both are JSON in the header's metadata, key `jaxgen`.
Nothing in a record can run code when it is read.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from jaxgen.data import examples
from jaxgen.data.examples import BadExample, Example, Source
from jaxgen.types import UserError

KEY = "jaxgen"
MAX_HEADER = 16 << 20
MOST_DAMAGED = 16  # records at the start that may be


def encode(example: Mapping[str, Any]) -> bytes:
    """An example of text, numbers, lists of them, bytes and numeric arrays -> a record.

    Raises:
        UserError: for a value of another type.
    """
    values, arrays, raw = {}, {}, []
    for name, value in example.items():
        if isinstance(value, bytes):
            raw.append(name)
            arrays[name] = np.frombuffer(value, np.uint8)
        elif isinstance(value, np.ndarray) and value.dtype.kind in "biuf":
            arrays[name] = np.ascontiguousarray(value)
        else:
            values[name] = value.item() if isinstance(value, np.generic) else value
    try:
        header = json.dumps({"values": values, "bytes": raw})
    except (TypeError, ValueError) as error:
        raise UserError(f"an example cannot be written: {error}") from None
    return safetensors.save(arrays, {KEY: header})


def decode(record: bytes) -> Example:
    """The example in a record; raises ValueError for bytes that are none."""
    length = int.from_bytes(record[:8], "little")
    if len(record) < 8 or not 0 < length <= min(len(record) - 8, MAX_HEADER):
        raise ValueError("no example in the form of jaxgen.data.records")
    header = json.loads(record[8 : 8 + length])
    stored = json.loads(header.get("__metadata__", {}).get(KEY, "null"))
    if not isinstance(stored, dict):
        raise ValueError(f"its header does not say {KEY!r}")
    arrays = safetensors.load(record)
    raw = {name: arrays.pop(name).tobytes() for name in stored["bytes"]}
    return {**stored["values"], **arrays, **raw}


def write_records(path: Path, rows: Iterable[Mapping[str, Any]], shards: int = 1) -> int:
    """Writes examples, turn by turn, to `shards` new files in the folder `path`; returns how many.

    Pictures are best given as the bytes of their files: they are stored as they are, and decoded
    when read.

    Raises:
        UserError: for values that cannot be written, and where there are records already.
    """
    writer = _needs_grain("array_record.python.array_record_module").ArrayRecordWriter
    names = [f"data-{i:05d}-of-{shards:05d}.array_record" for i in range(shards)]
    if path.is_dir() and any(path.glob("*array_record*")):
        raise UserError(f"{path} holds records already; name a new folder")
    count = 0
    try:
        path.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=path, prefix=".writing-") as scratch:
            with ExitStack() as stack:
                files = []
                for name in names:  # group_size 1: a picture is read without its neighbours
                    with _told(path):
                        files.append(writer(str(Path(scratch, name)), "group_size:1"))
                    stack.callback(_told(path)(files[-1].close))
                for count, row in enumerate(rows, 1):
                    record = encode(row)
                    with _told(path):
                        files[(count - 1) % shards].write(record)
            for name in names:
                Path(scratch, name).replace(path / name)
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from None
    return count


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """UserError for what the writer says of a full disk, in an error of no type of its own."""
    try:
        yield
    except RuntimeError as error:
        raise UserError(f"cannot write to {path}: {str(error).split(';')[0]}") from None


class Records(Source):
    """The examples in ArrayRecord files, in the order of the files' names.

    Args:
        ref: what the user called them.
        files: at least one.
        caption, columns: as for `Folder`; the first whole record is checked at the start.
    """

    def __init__(
        self, ref: str, files: list[Path], caption: str = "", columns: tuple[str, ...] = ()
    ):
        self.ref = ref
        self._caption = caption
        self._columns = columns
        self._source = open_records(ref, files)
        self._files = [[file.name, file.stat().st_size] for file in files]
        if not len(self._source):
            raise UserError(f"{ref} holds no records")
        self._pick(self._first())

    def _first(self) -> Example:
        """The first record that is whole, of some at the start."""
        reasons = []
        for i in range(min(len(self), MOST_DAMAGED)):
            try:
                return self._record(i)
            except BadExample as error:
                reasons.append(error.reason)
        raise UserError(f"{self.ref}: the first {len(reasons)} records are damaged: {reasons[0]}")

    def _pick(self, record: Example) -> tuple[str, dict[str, str]]:
        """The caption of a record, and the columns of its pictures by their names."""
        if not isinstance(record.get("image"), bytes | np.ndarray):
            there = ", ".join(record) or "none"
            raise UserError(f"{self.ref} has no column 'image' of pictures; it has {there}")
        caption = examples.pick_caption(record, self._caption, self.ref)
        found = examples.pick_pictures(record, self._columns, self.ref)
        encoded = {c: c for c in self._columns if isinstance(record.get(c), bytes)}
        return caption, {"image": "image"} | encoded | found

    def _record(self, i: int) -> Example:
        with examples.guard(self.name(i)):
            return decode(self._source[i])

    def __len__(self) -> int:
        return len(self._source)

    def read(self, i: int, least: int | None = None) -> Example:
        record = self._record(i)
        with examples.guard(self.name(i)):
            caption, found = self._pick(record)
        example = {k: v for k, v in record.items() if not examples.is_picture(k)}
        for column, key in found.items():
            if not isinstance(record[key], bytes | np.ndarray):
                raise BadExample(self.name(i), f"{key!r} is no picture")
            example[column] = examples.decode(record[key], column, self.name(i), least)
        return example | {"caption": caption}

    def fingerprint(self) -> dict[str, Any]:
        some = examples.crc_of_some(self, lambda i: self._source[i])
        return super().fingerprint() | {"files": self._files, "some_records": some}

    def size(self, i: int) -> tuple[int, int]:
        """As for any source, but the whole record is read: it is found in no other way."""
        record = self._record(i)
        if not isinstance(record.get("image"), bytes | np.ndarray):
            raise BadExample(self.name(i), "it has no image")
        return examples.size(record["image"], self.name(i))

    def name(self, i: int) -> str:
        return examples.printable(f"{self.ref}[{i}]")


def open_records(ref: str, files: list[Path]) -> Any:
    """Random access to the bytes of every record; grain reopens the files after pickling."""
    sources = _needs_grain("grain.sources")
    try:
        return sources.ArrayRecordDataSource([str(file) for file in files])
    except Exception as error:
        raise UserError(f"cannot read {ref}: {' '.join(str(error).split())[:300]}") from None


def _needs_grain(module: str) -> Any:
    try:
        return import_module(module)
    except ImportError:
        raise UserError("ArrayRecord files need grain: pip install 'jaxgen[data]'") from None

"""Safetensors files as lazily read tensors, and back. Nothing here unpickles anything."""

import hashlib
import json
import logging
import os
import re
import zlib
from collections.abc import Callable, Iterable, Mapping
from io import BufferedReader
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxgen.config import read_json
from jaxgen.types import UserError

log = logging.getLogger(__name__)
Slices = tuple[slice, ...]
PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
SUM = ".sha256"  # a file beside one of weights, as sha256sum writes it, says what that must hold
SHARD_BYTES = 5_000_000_000
VARIANTS = ("fp16", "bf16", "non_ema", "ema_only")  # that serve where there are no plain weights


class Tensor(NamedTuple):
    """A tensor on disk: its shape is known, its values are read when and where they are needed."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Slices], np.ndarray]  # one slice per axis -> that block; slices have step 1

    def rows(self, start: int, stop: int) -> "Tensor":
        """The block [start:stop] of the first axis, as a tensor of its own."""

        def read(index: Slices) -> np.ndarray:
            first, last, _ = index[0].indices(stop - start)
            return self.read((slice(start + first, start + last), *index[1:]))

        return Tensor((stop - start, *self.shape[1:]), self.dtype, read)

    def transposed(self, *axes: int) -> "Tensor":
        """The same values with axis `axes[i]` of this tensor as axis i."""
        inverse = np.argsort(axes)

        def read(index: Slices) -> np.ndarray:
            return self.read(tuple(index[i] for i in inverse)).transpose(axes)

        return Tensor(tuple(self.shape[i] for i in axes), self.dtype, read)

    def squeezed(self) -> "Tensor":
        """A 1x1 convolution's kernel (O, I, 1, 1) as a matrix (O, I)."""

        def read(index: Slices) -> np.ndarray:
            return self.read((*index, slice(0, 1), slice(0, 1)))[:, :, 0, 0]

        return Tensor(self.shape[:2], self.dtype, read)

    def numpy(self) -> np.ndarray:
        """All of it."""
        return self.read(tuple(slice(0, n) for n in self.shape))


Tensors = dict[str, Tensor]

_DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}


FLOATS = tuple(_DTYPES[name] for name in ("F64", "F32", "F16", "BF16"))


def open_file(path: Path) -> Tensors:
    """The tensors of one safetensors file, by key; no values are read yet, but for a sum's.

    What a tensor reads is a view of the file, which must not change until it has been copied.

    Raises:
        UserError: for pickles (which can run code), for files that are empty, truncated or of
            another format, and for those that are not what a `.sha256` beside them says; each names
            the file and the way out.
    """
    if path.suffix.lower() in PICKLES:
        raise UserError(
            f"{path} is a pickle, which can run code when read; convert it to safetensors first "
            "(diffusers: load it and save_pretrained(..., safe_serialization=True))"
        )
    try:
        file = path.open("rb")  # kept: what is put in its place later is not read
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    seen = _state(file)
    try:
        with safe_open(path, "np") as checked:  # every name, shape and offset
            keys = list(checked.keys())
        start = 8 + int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(start - 8))
        found = {
            k: (header[k]["dtype"], tuple(header[k]["shape"]), header[k]["data_offsets"][0])
            for k in keys
        }
    except (SafetensorError, OSError, ValueError, LookupError, TypeError) as error:
        what = "is damaged, truncated or not safetensors" if seen[0] else "is empty"
        raise UserError(f"{path} {what} ({error}); download it again") from None
    said = _sums(path)
    try:
        same = not said.is_file() or _digest(file) in said.read_text("utf-8", "replace").lower()
    except OSError as error:
        raise UserError(f"cannot read {path} and {said.name}: {error.strerror}") from None
    if not same:
        raise UserError(f"{path} is damaged: it is not what {said.name} says; download it again")

    def tensor(key: str) -> Tensor:
        name, shape, offset = found[key]
        if name not in _DTYPES:
            raise UserError(f"{path}: tensor {key} has dtype {name}, which is not supported")
        dtype = _DTYPES[name]

        def read(index: Slices) -> np.ndarray:
            if _state(file) != seen:
                raise UserError(f"{path} changed while it was read; try again")
            if 0 in shape:  # nothing cannot be mapped
                return np.empty(shape, dtype)[index]
            # Mapped anew each time: what was read is given back to the system with the array.
            return np.memmap(file, dtype, "r", start + offset, shape)[index]

        return Tensor(shape, dtype, read)

    return {key: tensor(key) for key in keys}


def _sums(path: Path) -> Path:
    return path.with_name(path.name + SUM)


def _digest(file: BufferedReader) -> str:
    file.seek(0)
    return hashlib.file_digest(file, "sha256").hexdigest()


def write_sum(path: Path) -> None:
    """Writes beside a file of weights what it must hold, for `open_file` (and `sha256sum -c`)."""
    beside = path.with_name(f".{path.name}{SUM}")
    with path.open("rb") as file:
        beside.write_text(f"{_digest(file)}  {path.name}\n", "utf-8")
    beside.replace(_sums(path))


def _state(file: BufferedReader) -> tuple[int, int]:
    """Size and time of the last change."""
    now = os.fstat(file.fileno())
    return now.st_size, now.st_mtime_ns


def variant_of(folder: Path, variant: str) -> str:
    """A variant where a folder has weights of it; else none, so that plain ones serve."""
    return variant if any(is_variant(p.name, variant) for p in folder.glob("*")) else ""


def is_variant(name: str, variant: str) -> bool:
    """Whether a file of weights, or the index of some, is of a variant (not of none)."""
    form = rf".*\.{re.escape(variant)}[.-].*(safetensors|json)"
    return bool(variant and re.fullmatch(form, name))


def open_folder(folder: Path, stem: str, variant: str = "") -> Tensors:
    """The tensors of one part of a model folder, sharded or not.

    Args:
        folder: e.g. `model/unet`.
        stem: file name without its suffix, e.g. `diffusion_pytorch_model`.
        variant: e.g. `fp16`, for `stem.fp16.safetensors`. Without one, and without a plain file,
            those of `VARIANTS` serve, in this order.
    """
    for name in [variant] if variant else ["", *VARIANTS]:
        infix = f".{name}" if name else ""
        whole = folder / f"{stem}{infix}.safetensors"
        indices = (
            folder / f"{stem}.safetensors.index{infix}.json",
            folder / f"{stem}{infix}.safetensors.index.json",
        )
        found = next((path for path in (whole, *indices) if path.is_file()), None)
        if found and name != variant:
            log.warning("%s holds no plain weights; those of %s serve", folder, name)
        if found:
            return open_file(found) if found == whole else _open_shards(found)
    pickles = sorted(p.name for p in folder.glob("*") if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{folder} has only {pickles[0]}, a pickle, which can run code when read; convert it "
            "to safetensors first (diffusers: save_pretrained(..., safe_serialization=True))"
        )
    raise UserError(f"{folder} has no {stem}{f'.{variant}' if variant else ''}.safetensors")


def _open_shards(index: Path) -> Tensors:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{index} has no weight_map")
    for name in weight_map.values():
        # The index comes from outside: a shard lies beside it and nowhere else.
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name):
            raise UserError(f"{index} names {name!r}, which is no safetensors file beside it")
    shards = {name: open_file(index.parent / name) for name in sorted(set(weight_map.values()))}
    absent = [key for key, name in weight_map.items() if key not in shards[name]]
    if absent:
        raise UserError(f"{index} promises {len(absent)} tensors its shards lack: {absent[0]} ...")
    for name, shard in shards.items():
        elsewhere = [key for key in shard if weight_map.get(key, name) != name]
        if elsewhere:
            raise UserError(f"{index} says {elsewhere[0]} is not in {name}, where there is one too")
    return {key: tensor for shard in shards.values() for key, tensor in shard.items()}


def save_folder(
    folder: Path,
    stem: str,
    tensors: Iterable[tuple[str, Callable[[], np.ndarray], int]],
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes `stem.safetensors`, or numbered shards and their index where it would be too large.

    Args:
        tensors: (key, values on demand, bytes) of each tensor, so that one shard at a time is held.
    """
    shards: list[dict[str, Callable[[], np.ndarray]]] = [{}]
    held = total = 0
    for key, read, size in tensors:
        if held and held + size > shard_bytes:
            shards.append({})
            held = 0
        shards[-1][key] = read
        held, total = held + size, total + size
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt"}  # transformers and diffusers ask for it
    weight_map: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        name = f"{stem}.safetensors"
        if len(shards) > 1:
            name = f"{stem}-{i:05}-of-{len(shards):05}.safetensors"
        weight_map |= dict.fromkeys(shard, name)
        values = {k: np.asarray(f(), order="C") for k, f in shard.items()}
        try:
            # Beside it first: the values may be views of the file that this one replaces.
            save_file(values, folder / f".{name}", metadata)
            _sums(folder / name).unlink(missing_ok=True)  # of what was there
            os.replace(folder / f".{name}", folder / name)
        except SafetensorError as error:  # a full disk among others
            raise UserError(f"cannot write {folder / name}: {error}") from None
        os.chmod(folder / name, 0o644)
    whole, index = folder / f"{stem}.safetensors", folder / f"{stem}.safetensors.index.json"
    if len(shards) > 1:
        content = {"metadata": {"total_size": total}, "weight_map": weight_map}
        index.write_text(json.dumps(content, indent=2) + "\n")
        _sums(whole).unlink(missing_ok=True)
        whole.unlink(missing_ok=True)  # left by an earlier save, it would be read instead
    else:
        index.unlink(missing_ok=True)


def fingerprint(parts: Mapping[str, Tensors]) -> str:
    """What tells these parameters from others: names, shapes, and a few values of each tensor."""
    found = 0
    for name in sorted(parts):
        for key, tensor in sorted(parts[name].items()):
            block = np.ascontiguousarray(tensor.read((slice(0, 4),) * len(tensor.shape)))
            found = zlib.crc32(f"{name}/{key} {tensor.shape}".encode(), found)
            found = zlib.crc32(block.tobytes(), found)
    return f"{found:08x}"


def report(
    expected: Mapping[str, tuple[int, ...]],
    found: Mapping[str, tuple[int, ...]],
    where: str,
    whole: Iterable[str] = (),
) -> None:
    """Compares tensor names and shapes; one error tells of every difference at once.

    Those that hold whole numbers, `whole`, are named with them.
    """
    missing = sorted(expected.keys() - found.keys())
    extra = sorted(found.keys() - expected.keys())
    shapes = [
        f"{k} is {list(found[k])} and should be {list(expected[k])}"
        for k in sorted(expected.keys() & found.keys())
        if tuple(expected[k]) != tuple(found[k])
    ]
    parts = []
    for title, items in (
        ("missing", missing),
        ("unexpected", extra),
        ("misshapen", shapes),
        ("of whole numbers", sorted(whole)),
    ):
        if items:
            parts.append(f"{len(items)} {title}: {', '.join(items)}")
    if parts:
        raise UserError(f"{where} does not fit its config; " + "; ".join(parts))

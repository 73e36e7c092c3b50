"""Typed values from the config files of checkpoints.

A config is a frozen dataclass of what jaxgen supports; whatever else a file may say is listed as
`fixed`: fields whose one supported value is known. So no field is ever silently ignored.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from pathlib import Path
from types import UnionType
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from jaxgen.types import UserError

T = TypeVar("T")
MAX_BYTES = 16 << 20  # a JSON file of a model folder is small; larger ones are not ours


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file, or a one-line error that names the file."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(f"{path} is larger than {MAX_BYTES >> 20} MiB; is it a config file?")
        value = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply to be a config file") from None
    except ValueError as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds a {type(value).__name__}, not a JSON object")
    return value


def freeze(value: Any) -> Any:
    """Lists become tuples, at every depth, so that a config is hashable."""
    return tuple(freeze(v) for v in value) if isinstance(value, list | tuple) else value


def parse(cls: type[T], data: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> T:
    """A config file's fields as a value of the dataclass `cls`.

    Args:
        cls: frozen dataclass; its defaults serve for the absent keys.
        data: the file's object. Keys that start with an underscore are its author's notes.
        fixed: keys that `cls` has no field for, and the only value supported for each; a tuple
            subclass `AnyOf` lists several. `...` stands for any value: the field changes nothing.
        where: what to call the file in an error.

    Raises:
        UserError: for unknown keys and for values not supported, all of them at once.
    """
    known = get_type_hints(cls)
    wrong = []
    values: dict[str, Any] = {}
    for key, value in data.items():
        if key.startswith("_"):
            continue
        value = freeze(value)
        if key in known:
            values[key] = value
            if not _fits(value, known[key]):
                wrong.append(f"{key} = {value!r} is not of type {_name(known[key])}")
        elif key not in fixed:
            close = difflib.get_close_matches(key, [*known, *fixed], 1)
            hint = f" (perhaps {close[0]}?)" if close else ""
            wrong.append(f"unknown field {key!r}{hint}")
        elif not _allowed(value, fixed[key]):
            wrong.append(f"{key} = {value!r} is not supported (only {fixed[key]!r} is)")
    if wrong:
        raise UserError(f"{where}: " + "; ".join(wrong))
    try:
        return cls(**values)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value of a JSON file is of an annotated type; whole numbers serve as floats."""
    if isinstance(kind, UnionType):
        return any(_fits(value, k) for k in get_args(kind))
    if get_origin(kind) is tuple:
        return isinstance(value, tuple) and all(_fits(v, get_args(kind)[0]) for v in value)
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def _name(kind: Any) -> str:
    return str(kind) if get_args(kind) else kind.__name__


def check_positive(value: Any, *names: str) -> None:
    """UserError unless these fields of a config, numbers or tuples of numbers, are above zero."""
    for name in names:
        numbers = getattr(value, name)
        if not all(n > 0 for n in (numbers if isinstance(numbers, tuple) else (numbers,))):
            raise UserError(f"{name} = {numbers} is not above zero")


def check_size(value: Any) -> None:
    """UserError unless a config's `sample_size`, where there is one, is a side, or two."""
    size = value.sample_size
    if size is None:
        return
    check_positive(value, "sample_size")
    if isinstance(size, tuple) and len(size) != 2:
        raise UserError(f"sample_size = {size} is neither one number nor two")


class AnyOf(tuple):
    """Several supported values of one fixed field."""

    __slots__ = ()

    def __repr__(self) -> str:
        return " or ".join(repr(v) for v in self)


def _allowed(value: Any, only: Any) -> bool:
    if only is ...:
        return True
    return value in only if isinstance(only, AnyOf) else value == only


def dump(value: Any, class_name: str) -> dict[str, Any]:
    """The config file of a dataclass: diffusers fills what is absent with the same defaults."""
    return {"_class_name": class_name} | dataclasses.asdict(value)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes an object as an indented JSON file, or replaces one: never half of it."""
    beside = path.with_name(f".{path.name}.unfinished")
    beside.write_text(json.dumps(value, indent=2) + "\n", "utf-8")
    beside.replace(path)

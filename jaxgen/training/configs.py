"""Config files: Python with one typed value, `config`, which options of the command change."""

import dataclasses
import difflib
import re
import runpy
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from jaxgen.training.recipe import Train
from jaxgen.types import UserError

_UNEXPECTED = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")


def read(path: Path, options: Sequence[str], parse: Callable[..., Any] = tyro.cli) -> Train:
    """The recipe in a file, changed by options such as `--optimizer.learning-rate 3e-4`.

    A config is a program: run only those that you trust.

    Args:
        parse: `tyro.cli`, or what turns its complaints into errors.

    Raises:
        UserError: for a file that is missing, fails, or states no recipe, and for fields of an
            unknown name or a wrong type, with the nearest name.
    """
    if not path.is_file():
        beside = [p.name for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, 1)
        hint = f"; perhaps {path.parent / close[0]}?" if close else ""
        raise UserError(f"no config file {path}{hint}")
    try:
        value = runpy.run_path(str(path)).get("config")
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    except TypeError as error:
        raise UserError(f"{path}: {_explained(error)}") from None
    except Exception as error:
        raise UserError(f"{path}: {type(error).__name__}: {error}") from None
    if not isinstance(value, Train):
        raise UserError(f"{path} does not state config = Train(...)")
    check(value, str(path))
    if options:
        value = parse(
            Train, default=value, args=list(options), config=(tyro.conf.AvoidSubcommands,)
        )
        check(value, "options")
    return value


def _explained(error: TypeError) -> str:
    found = _UNEXPECTED.search(str(error))
    if not found:
        return str(error)
    known = [f.name for kind in _kinds(Train) if kind.__name__ == found[1] for f in _fields(kind)]
    close = difflib.get_close_matches(found[2], known, 1)
    hint = f"; perhaps {close[0]}?" if close else f"; there are {', '.join(known)}" * bool(known)
    return f"{found[1]} has no field {found[2]!r}{hint}"


def _fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    return dataclasses.fields(kind)


def _kinds(kind: type) -> list[type]:
    """A dataclass and all that its fields may hold."""
    found = [kind]
    for annotation in get_type_hints(kind).values():
        for inner in (annotation, *get_args(annotation)):
            if dataclasses.is_dataclass(inner) and isinstance(inner, type):
                found += _kinds(inner)
    return found


def check(value: Any, where: str, prefix: str = "") -> None:
    """UserError where a field of a dataclass, at any depth, holds what its annotation forbids."""
    for name, kind in get_type_hints(type(value)).items():
        inner = getattr(value, name)
        if not _fits(inner, kind):
            wanted = kind.__name__ if isinstance(kind, type) else str(kind).replace("typing.", "")
            wanted = re.sub(r"[\w.]+\.(\w+)", r"\1", wanted)
            raise UserError(f"{where}: {prefix}{name} = {inner!r} is not of type {wanted}")
        if dataclasses.is_dataclass(inner):
            check(inner, where, f"{prefix}{name}.")


def _fits(value: Any, kind: Any) -> bool:
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(_fits(value, k) for k in inner)
    if origin is Literal:
        return value in inner
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if len(inner) == 2 and inner[1] is Ellipsis:
            return all(_fits(v, inner[0]) for v in value)
        return len(value) == len(inner) and all(_fits(v, k) for v, k in zip(value, inner))
    if isinstance(value, bool) and kind is not bool:
        return False
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)

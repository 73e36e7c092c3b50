"""Config files: Python with one typed value, `config`, which options of the command change."""

import dataclasses
import difflib
import math
import re
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import tyro

from jaxgen.training.recipe import Train
from jaxgen.types import UserError

# What Python says of calls and names that it does not understand.
_UNEXPECTED = re.compile(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'")
_ABSENT = re.compile(r"(\w+)\.__init__\(\) missing .* arguments?: (.*)")
_NOT_THERE = re.compile(r"cannot import name '(\w+)' from '([\w.]+)'")


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
        near = perhaps(path.name, beside, str(path.parent / "{}"))
        raise UserError(f"no config file {path}{near}")
    value = _run(path)
    check(value, str(path))
    if options:
        value = parse(
            Train, default=value, args=list(options), config=(tyro.conf.AvoidSubcommands,)
        )
        check(value, "options")
    return value


def perhaps(word: str, known: Iterable[str], form: str = "{}") -> str:
    """The nearest of the known words, as the end of an error: "; perhaps steps?"."""
    close = difflib.get_close_matches(word, list(known), 1)
    return f"; perhaps {form.format(close[0])}?" if close else ""


def _run(path: Path) -> Train:
    """What the file states; whatever it raises, as one line."""
    try:
        stated = runpy.run_path(str(path))
    except (Exception, SystemExit) as error:
        raise UserError(f"{path}{_line(error, path)}: {_explained(error)}") from None
    value = stated.get("config")
    if not isinstance(value, Train):
        others = [name for name, other in stated.items() if isinstance(other, Train)]
        hint = f"; was {others[0]} meant?" if others else ""
        raise UserError(f"{path} does not state config = Train(...){hint}")
    return value


def _line(error: BaseException, path: Path) -> str:
    """Where in the file it is."""
    if isinstance(error, SyntaxError) and error.filename == str(path):
        return f", line {error.lineno}"
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
    return f", line {lines[-1]}" if lines else ""


def _explained(error: BaseException) -> str:
    """What a program's error means to whom it is a config."""
    text = str(error)
    if isinstance(error, UserError):
        return text
    if isinstance(error, SyntaxError):
        return f"not Python: {error.msg}"
    if found := _UNEXPECTED.search(text):
        kinds = [kind for kind in _kinds(Train) if kind.__name__ == found[1]]
        known = [field.name for kind in kinds for field in _fields(kind)]
        near = perhaps(found[2], known) or f"; there are {', '.join(known)}" * bool(known)
        return f"{found[1]} has no field {found[2]!r}{near}"
    if found := _ABSENT.search(text):
        return f"{found[1]} needs {found[2]}"
    for frame, _ in traceback.walk_tb(error.__traceback__):  # a comparison with a wrong type
        if frame.f_code.co_name == "__post_init__" and "self" in frame.f_locals:
            try:
                check(frame.f_locals["self"], frame.f_locals["self"].__class__.__name__)
            except UserError as cause:
                return str(cause)
    return f"{type(error).__name__}: {text}{_nearest(error)}".removesuffix(": ")


def _nearest(error: BaseException) -> str:
    """What a name that is not there was perhaps to be."""
    if isinstance(error, NameError) and error.name:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        return perhaps(error.name, frame.f_globals)
    if isinstance(error, AttributeError) and error.name:
        return perhaps(error.name, dir(error.obj))
    if found := _NOT_THERE.search(str(error)):
        return perhaps(found[1], dir(sys.modules.get(found[2])))
    return ""


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
    """UserError where a field of a dataclass, at any depth, holds what its annotation forbids.

    Numbers that are not finite are of no type.
    """
    for name, kind in get_type_hints(type(value)).items():
        inner = getattr(value, name)
        if not _fits(inner, kind):
            raise UserError(f"{where}: {prefix}{name} = {inner!r} is not {_named(kind)}")
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
    if kind is float:
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(value, kind)


def _named(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(repr, get_args(kind)))}"
    name = kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    short = re.sub(r"[a-zA-Z_][\w.]*\.(\w+)", r"\1", name)  # without modules
    return "of type " + short.replace("float", "finite number")

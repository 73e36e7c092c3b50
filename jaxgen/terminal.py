"""What the command says and how it reads words: tyro's messages in one line, notices, values."""

import _thread
import contextlib
import io
import logging
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from tqdm import tqdm

from jaxgen.types import UserError


def parse(*args: Any, **kwargs: Any) -> Any:
    """`tyro.cli`; what it says of a mistake becomes the one line of a UserError."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(*args, **kwargs)
    except SystemExit as stop:
        if not stop.code:
            raise
        text = re.sub(r"\x1b\[[0-9;]*m|[─│╭╮╰╯]", " ", said.getvalue())
        text = " ".join(text.split()).removeprefix("Value error ").removeprefix("Error ")
        text = re.split(r" Argument helptext:|\.? For full helptext", text)[0]
        raise UserError(f"{_tidy(text)}; see {kwargs['prog']} --help") from None


def _tidy(text: str) -> str:
    """What tyro says of a mistake, in fewer words."""
    unknown = r"Unrecognized options (?:Unrecognized options: )?"
    if found := re.match(unknown + r"(.*?)(?: Perhaps you meant: (--[\w.-]+).*)?$", text):
        words = found[1].split(", ")
        names = [word for word in words if word.startswith("-")] or words
        hint = f"; perhaps {found[2]}?" if found[2] else ""
        return f"no option {', '.join(names)}{hint}"
    for pattern, words in (
        (r"^(Missing argument|Invalid choice) |^parsing ([A-Z]\w*: )?", ""),
        (r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is no whole number"),
        (r"could not convert string to float: ('.*')", r"\1 is no number"),
        (r"no type matching (\S+) could be instantiated from \[(.*?)\]\..*", r"\2 is not \1"),
    ):
        text = re.sub(pattern, words, text)
    return text or "no such option"


@contextlib.contextmanager
def notices_after() -> Iterator[None]:
    """What the library logs is said once all is well: an error stays the one line it is."""
    notices: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("jaxgen")
    logger.addHandler(handler)
    try:
        yield
        for notice in notices:
            print(f"jaxgen: {notice}", file=sys.stderr)
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def notices_at_once() -> Iterator[None]:
    """What the library logs is said above the progress bar."""
    handler = logging.Handler()
    say = lambda record: tqdm.write(f"jaxgen: {record.getMessage()}", file=sys.stderr)  # noqa: E731
    handler.emit = say  # type: ignore[method-assign]
    logger = logging.getLogger("jaxgen")
    logger.addHandler(handler)
    before, logger.propagate = logger.propagate, False
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.propagate = before


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C ends what runs within, whenever it comes.

    Where Python calls back in the midst of something else, as JAX has it do while it collects
    garbage, an exception is reported and lost: a loop of steps would go on. It is raised again.
    """
    before = sys.unraisablehook

    def again(lost: Any) -> None:
        if issubclass(lost.exc_type, KeyboardInterrupt):
            threading.Timer(0.05, _thread.interrupt_main).start()
        else:
            before(lost)

    sys.unraisablehook = again
    try:
        yield
    finally:
        sys.unraisablehook = before


def use_compile_cache() -> None:
    """Compiled programs are kept between runs, unless the user's own settings say where."""
    import jax

    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    except RuntimeError:  # a user without a home, in a container
        return
    jax.config.update("jax_compilation_cache_dir", str(home / "jaxgen" / "compiled"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def read_lines(path: Path) -> list[str]:
    """The lines of a text file that say something, whatever system wrote it."""
    try:
        text = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {error}") from None
    return [line for line in re.split(r"\r\n|\n|\r", text) if line.strip()]


def read_size(text: str | None) -> tuple[int, int] | None:
    """WIDTHxHEIGHT -> (width, height); UserError for anything else."""
    if text is None:
        return None
    match = re.fullmatch(r"(\d{1,6})x(\d{1,6})", text)
    if not match:
        raise UserError(f"--size {text} is not WIDTHxHEIGHT, as in 512x512")
    return int(match[1]), int(match[2])


def read_pair(text: str, name: str) -> tuple[float, float]:
    """`low,high` -> (low, high); UserError, with the option's `name`, for anything else."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        raise UserError(f"{name} {text} is not two numbers, as in 0.2,0.8") from None
    return low, high

"""One run at a time in a folder, and folders that are whole or not there."""

import glob
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from jaxgen.types import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def hold(folder: Path, option: str) -> int | None:
    """Holds a folder until the process ends, or the descriptor it returns is closed.

    None where the system has no locks.

    Raises:
        UserError: if another process holds it; it names the option that names another folder.
    """
    if fcntl is None:
        return None
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(f"another run is writing to {folder}; name another {option}") from None
    except OSError:  # a file system without locks
        os.close(descriptor)
        return None
    return descriptor


@contextmanager
def whole(out: Path) -> Iterator[Path]:
    """A scratch folder beside `out`, which is `out` in the end, or gone if anything is raised.

    What killed commands left there is removed; SIGTERM stops what is done inside as Ctrl-C does.

    Args:
        out: a new or empty folder.

    Raises:
        UserError: where nothing can be written.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch, held = _scratch(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    try:
        with _interrupted():
            yield scratch
        os.chmod(scratch, 0o755)
        if out.exists():
            out.rmdir()
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)


def _scratch(out: Path) -> tuple[Path, int | None]:
    """A new folder beside `out`, and what holds it; those that killed commands left are removed."""
    prefix = f".{out.name}.unfinished-"
    for left in out.parent.glob(f"{glob.escape(prefix)}*"):
        with suppress(UserError):  # another command is at work in it
            held = hold(left, "--out")
            if held is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)
    while True:  # until nobody took it for one that was left, before it was held
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=out.parent))
        with suppress(UserError, FileNotFoundError):
            held = hold(scratch, "--out")
            if scratch.exists():
                return scratch, held
            if held is not None:
                os.close(held)


@contextmanager
def _interrupted() -> Iterator[None]:
    """SIGTERM stops what is done inside as Ctrl-C does, so that nothing unfinished is left."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

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
def whole(out: Path, last: str) -> Iterator[Path]:
    """A scratch folder, which is `out` in the end, or gone if anything is raised.

    What killed commands left there is removed; SIGTERM stops what is done inside as Ctrl-C does,
    unless the process has a way of its own.

    Args:
        out: a new folder, or an empty one, which is filled: one may be in it, and it may be a disk.
        last: the file that makes such a folder one; an empty folder is given it after all others.

    Raises:
        UserError: where nothing can be written.
    """
    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch, held = _scratch(out, out if out.exists() else out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    try:
        with _interrupted():
            yield scratch
            os.chmod(scratch, 0o755)
            if out.exists():
                _fill(out, scratch, last)
            else:
                scratch.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
        if held is not None:
            os.close(held)


def _fill(out: Path, scratch: Path, last: str) -> None:
    """Moves all that a scratch folder holds to one that is still empty, or back if that fails."""
    if any(path != scratch for path in out.iterdir()):
        raise UserError(f"{out} is no longer empty; name another folder")
    moved: list[Path] = []
    try:
        for child in sorted(scratch.iterdir(), key=lambda path: path.name == last):
            moved.append(child)
            child.rename(out / child.name)
    except BaseException:
        for child in moved:
            with suppress(FileNotFoundError):  # the last one may have stayed
                (out / child.name).rename(child)
        raise


def unfinished(out: Path) -> str:
    """How the names of scratch folders for `out` begin."""
    return f".{out.name}.unfinished-"


def _scratch(out: Path, place: Path) -> tuple[Path, int | None]:
    """A new folder in `place`, and what holds it.

    Those that killed commands left there, or beside `out`, are removed.
    """
    prefix = unfinished(out)
    pattern = f"{glob.escape(prefix)}*"
    for left in {*place.glob(pattern), *out.parent.glob(pattern)}:
        with suppress(UserError):  # another command is at work in it
            held = hold(left, "--out")
            if held is not None:
                shutil.rmtree(left, ignore_errors=True)
                os.close(held)
    while True:  # until nobody took it for one that was left, before it was held
        scratch = Path(tempfile.mkdtemp(prefix=prefix, dir=place))
        with suppress(UserError, FileNotFoundError):
            held = hold(scratch, "--out")
            if scratch.exists():
                return scratch, held
            if held is not None:
                os.close(held)


@contextmanager
def _interrupted() -> Iterator[None]:
    """SIGTERM stops what is done inside as Ctrl-C does, so that nothing unfinished is left."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)

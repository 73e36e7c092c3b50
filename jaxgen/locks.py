"""One run at a time in a folder."""

import os
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

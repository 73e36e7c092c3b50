"""Checkpoints: a step's state and the record of its run, all or nothing.

The one module that knows Orbax. A checkpoint is written beside the training, and counts from the
moment when its folder gets its name: a run that is killed goes on from the last one that has it.
"""

import contextlib
import errno
import logging
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxgen import locks
from jaxgen.training import together
from jaxgen.types import UserError

logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells every step, and errors twice
_OTHER = ("tree structures do not match", "Requested shape")  # what Orbax says of another state
_ASYNCIO = logging.getLogger("asyncio")
logger = logging.getLogger(__name__)

PATIENCE = 50  # tenths of a second for threads that write to fail too


class Checkpoints:
    """The checkpoints in a folder: read by anyone, and written inside a `with`, by one run at once.

    Attributes:
        latest: the last step that was saved whole; None if there is none.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Looks, and writes nothing. UserError for a folder that cannot be read."""
        self.folder, self._keep = folder.resolve(), keep
        self._saving: int | None = None
        self._lock: int | None = None
        _be_brief()
        self.latest = self._last()

    def record(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        return self._read(step, "record", ocp.args.JsonRestore())

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, on the devices of `like`, a tree of shapes with shardings."""
        return self._read(step, "state", ocp.args.StandardRestore(like))

    def __enter__(self) -> "Checkpoints":
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._keep, create=True, cleanup_tmp_directories=True
        )
        try:
            with together.leaving():
                self.folder.mkdir(parents=True, exist_ok=True)
                if jax.process_index() == 0:
                    self._lock = locks.hold(self.folder, "folder (out)")
                together.ready()  # the manager waits for all of them
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("state", "record")
            )
        except OSError as error:
            self._let_go()
            raise UserError(f"cannot write {self.folder}: {_reason(error)}") from None
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        """Waits for what is being written, and lets go of the folder."""
        try:
            self.wait()
        except UserError as late:
            if error is None:
                raise
            logger.warning("%s", late)
        finally:
            with contextlib.suppress(OSError, ValueError, RuntimeError):  # which were told
                self._manager.close()
            if jax.process_index() == 0:
                self._remove_halves()
            self._let_go()

    def _remove_halves(self) -> None:
        """What could not be written takes room; threads that have not failed yet may add to it."""
        for _ in range(PATIENCE):
            halves = [*self.folder.glob("*.orbax-checkpoint-tmp*")]
            for half in halves:
                shutil.rmtree(half, ignore_errors=True)
            if not halves:
                return
            time.sleep(0.1)

    def _let_go(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Begins to write; returns once the state is copied, and the next step may change it.

        Raises:
            UserError: if this, or what was begun before, cannot be written; so do `look`, `wait`
                and the end of the `with`.
        """
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        self.wait()
        self._saving = step
        self._try(lambda: self._manager.save(step, args=args, force=True))

    def look(self) -> None:
        """Whether what was begun has failed by now; does not wait for it."""
        # Several processes hear of it together, at the next save.
        if self._saving and jax.process_count() == 1 and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Until what was begun is written."""
        if self._saving:
            self._try(self._manager.wait_until_finished)
            self._saving, self.latest = None, self._last()

    def stops(self, step: int) -> bool:
        """Whether a signal to stop has reached any process; all of them hear it at one step."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def kept(self) -> str:
        """What there is to go on from, for an error."""
        last = self._last()
        return "no checkpoint yet" if last is None else f"the checkpoint of step {last} is whole"

    def _last(self, below: float = math.inf) -> int | None:
        """From the disk: after an error Orbax misremembers."""
        try:
            there = self.folder.iterdir() if self.folder.exists() else ()
            steps = [int(p.name) for p in there if p.name.isdecimal()]
        except OSError as error:
            raise UserError(f"cannot read {self.folder}: {_reason(error)}") from None
        return max((step for step in steps if step < below), default=None)

    def _read(self, step: int, item: str, args: Any) -> Any:
        folder = self.folder / str(step)
        try:
            with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as reader:
                return reader.restore(folder, args=ocp.args.Composite(**{item: args}))[item]
        except Exception as error:  # there is no telling which, of a damaged file
            if isinstance(error, MemoryError) or memory_is_full(error):
                raise  # else one would be told to remove what is whole
            raise UserError(f"cannot read {folder}: {self._why(step, error)}") from None

    def _why(self, step: int, error: Exception) -> str:
        if not any((self.folder / str(step) / item).is_dir() for item in ("state", "record")):
            return "it is of another program; name another folder (out)"
        if any(words in str(error) for words in _OTHER):
            return "it is of another model; undo the change, or name another folder (out)"
        number = code(error)
        if number not in (None, errno.ENOENT):
            return os.strerror(number)
        if jax.process_count() > 1:  # it may be whole, and the network or another process at fault
            return _reason(error)
        before = self._last(below=step)
        rest = "to begin anew" if before is None else f"to go on from step {before}"
        return f"a file in it is damaged or missing; remove it {rest}"

    def _try(self, act: Callable[[], Any]) -> None:
        try:
            act()
        except (OSError, ValueError, RuntimeError) as error:
            what = f"step {self._saving} in " if self._saving else "in "
            self._saving = None
            raise UserError(
                f"cannot save {what}{self.folder}: {_reason(error)}; {self.kept()}"
            ) from None


def code(error: Exception) -> int | None:
    """The system's number of an error, which libraries put behind long names of files."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"os_error_code='(\d+)'|\(os error (\d+)\)", str(error))
    return int(found[1] or found[2]) if found else None


def memory_is_full(error: Exception) -> bool:
    """Whether it was the memory of a device, or a host, that did not suffice."""
    return "out of memory" in str(error).lower()


def _reason(error: Exception) -> str:
    number = code(error)
    if number:
        return os.strerror(number)
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _be_brief() -> None:
    """Where one array cannot be written or read, there are tracebacks for all the others, too."""
    before = sys.unraisablehook
    if any(isinstance(f, _NotOfOrbax) for f in _ASYNCIO.filters):
        return
    _ASYNCIO.addFilter(_NotOfOrbax())

    def hook(unraisable: Any) -> None:
        told = f"{unraisable.exc_value!r} {unraisable.object!r}"
        if "Event loop is closed" not in told and "_read_array_index" not in told:
            before(unraisable)

    sys.unraisablehook = hook


class _NotOfOrbax(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return "orbax" not in record.getMessage()

"""Checkpoints: a step's state and the record of its run, all or nothing.

The one module that knows Orbax. A checkpoint is written beside the training, and counts from the
moment when its folder gets its name: a run that is killed goes on from the last one that has it.
"""

import logging
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from jaxgen.types import UserError

logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax tells every step of every save


class Checkpoints:
    """The checkpoints in a folder.

    Attributes:
        latest: the last step that was saved whole; None if there is none.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        """Raises UserError where nothing can be written."""
        self.folder = folder.resolve()
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=True,
            enable_async_checkpointing=True,
            cleanup_tmp_directories=True,
        )
        try:
            self._manager = ocp.CheckpointManager(
                self.folder, options=options, item_names=("state", "record")
            )
        except OSError as error:
            raise UserError(f"cannot write {folder}: {error.strerror or error}") from None
        self.latest: int | None = self._manager.latest_step()

    def record(self, step: int) -> dict[str, Any]:
        """What `save` was given beside the state."""
        args = ocp.args.Composite(record=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["record"]

    def restore(self, step: int, like: Any) -> Any:
        """The state of a step, on the devices of `like`, a tree of shapes with shardings."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(like))
        try:
            return self._manager.restore(step, args=args)["state"]
        except (ValueError, KeyError, OSError) as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(f"cannot read checkpoint {self.folder / str(step)}: {first}") from None

    def save(self, step: int, state: Any, record: dict[str, Any]) -> None:
        """Begins to write; returns once the state is copied, and the next step may change it."""
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(state), record=ocp.args.JsonSave(record)
        )
        self._try(lambda: self._manager.save(step, args=args, force=True))

    def wait(self) -> None:
        """Until what was begun is written."""
        self._try(self._manager.wait_until_finished)
        self.latest = self._manager.latest_step()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def stops(self, step: int) -> bool:
        """Whether a signal to stop has reached any process; all of them hear it at one step."""
        return jax.process_count() > 1 and self._manager.reached_preemption(step)

    def _try(self, act: Any) -> None:
        try:
            act()
        except (OSError, ValueError, RuntimeError) as error:
            first = (str(error).strip() or type(error).__name__).splitlines()[0]
            last = self._manager.latest_step()
            kept = (
                f"the checkpoint of step {last} is whole" if last is not None else "none is whole"
            )
            raise UserError(f"cannot save in {self.folder}: {first}; {kept}") from None

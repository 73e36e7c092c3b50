"""Events for TensorBoard: scalars and pictures, through tensorboardX's records."""

import logging
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

logger = logging.getLogger(__name__)


class Board:
    """An event file, written as it is told.

    tensorboardX's own SummaryWriter writes from a thread, by way of a queue: where the thread dies,
    of a full disk for one, the training hangs at the eleventh event. Here that is an OSError.
    """

    def __init__(self, folder: Path, first: int) -> None:
        """Opens a file of its own in the folder; TensorBoard hides what others say after `first`.

        Raises:
            ImportError: without tensorboardX. OSError: if nothing can be written.
        """
        from tensorboardX import summary  # optional, and slow to import
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto.event_pb2 import Event, SessionLog

        folder.mkdir(parents=True, exist_ok=True)
        self._make, self._event = summary, Event
        # Else a run that goes on within the second in which it stopped takes the same name.
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}.{first}")
        self._say(first + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One event for each value."""
        for name, value in values.items():
            self._say(step, summary=self._make.scalar(name, value))
        self._file.flush()

    def image(self, step: int, name: str, image: np.ndarray) -> None:
        """A picture, uint8 [H, W, 3]."""
        self._say(step, summary=self._make.image(name, image, dataformats="HWC"))
        self._file.flush()

    def close(self) -> None:
        """Nothing can be said after."""
        self._file.close()

    def _say(self, step: int, **what: Any) -> None:
        self._file.write_event(self._event(wall_time=time.time(), step=step, **what))


def board(folder: Path, first: int) -> Board | None:
    """A Board; without tensorboardX none, which is said once a run."""
    try:
        return Board(folder, first)
    except ImportError:
        logger.warning("no TensorBoard: pip install tensorboardX, or turn it off")
        return None

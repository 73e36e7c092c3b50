"""What a run says of itself: JSON lines, TensorBoard, a progress bar; and where it diverged."""

import contextlib
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from jaxgen import flops as operations
from jaxgen.data import images
from jaxgen.training.board import Board, board
from jaxgen.training.lines import Means, keep_until, line
from jaxgen.types import Array, UserError

FINITE = ("loss", "grad_norm")  # a run in which these are not is over
TIMES = ("images_per_second", "flops_per_second", "mfu")  # the fields that no two runs share


class Diverged(UserError):
    """A loss or gradient that is not a number: what follows would be lost work."""

    def __init__(self, step: int, name: str, value: float):
        super().__init__(
            f"{name} is {value} at step {step}; the last good checkpoint is kept; "
            "a lower learning_rate or a longer warmup may help"
        )
        self.step, self.name, self.value = step, name, value


class Log:
    """Metrics of a run, read one step late: the device has its next step before it is waited for.

    In `folder`: `metrics.jsonl`, a line every `every` steps with the means since the last one;
    `tensorboard/`, the same; `samples/00001000.png`. Process 0 writes (`writes`), and all of them
    look whether the run is still finite. A resumed run's `metrics.jsonl` equals that of a run never
    interrupted, but for TIMES, if `state()` is kept with the checkpoint and handed back.
    """

    def __init__(
        self,
        folder: Path,
        total: int,
        first: int,
        batch_size: int,
        flops: int,
        needed: int,
        devices: Sequence[Any],
        tensorboard: bool = True,
        progress: bool = True,
        writes: bool = True,
        every: int = 10,
        resumed: Mapping[str, Any] | None = None,
    ):
        """Drops from `metrics.jsonl` what a killed run wrote after its last checkpoint.

        Args:
            total: steps of the whole run; first: those made before, 0 for a new run.
            batch_size: images of a step, over all devices.
            flops: operations of a step, over all devices; needed: without those that
                rematerialisation makes a second time, for the share of the devices' peak (`mfu`).
            devices: all that take part.
            resumed: `state()` as it was at step `first`.

        Raises:
            UserError: if nothing can be written to the folder.
        """
        self.folder, self.total, self.every = folder, total, every
        self.batch_size, self.writes = batch_size, writes
        self.flops, self.needed = flops, needed
        peaks = [operations.peak(device) for device in devices]
        self.peak = sum(p for p in peaks if p) if all(peaks) else None
        self._pending: tuple[int, dict[str, Any]] | None = None
        self._means = Means(resumed or {})
        self._clock: float | None = None  # since when steps are timed: from the second one on, for
        self._steps = 0  # the first one waits for the compiler; and how many were
        self._file: TextIO | None = None
        self._board: Board | None = None
        if writes:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                keep_until(folder / "metrics.jsonl", first)
                self._file = (folder / "metrics.jsonl").open("a", encoding="utf-8")
                self._board = board(folder / "tensorboard", first) if tensorboard else None
            except OSError as error:
                raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
        hidden = not (progress and writes)
        self._bar = tqdm(total=total, initial=first, unit="step", disable=hidden)

    def add(self, step: int, metrics: Mapping[str, Array | float]) -> None:
        """Takes the metrics of a step that was just started, and reads those of the step before.

        Raises:
            Diverged: if the step before was not finite.
        """
        self.flush()
        for value in metrics.values():
            if isinstance(value, jax.Array):
                value.copy_to_host_async()
        self._pending = step, dict(metrics)

    def flush(self) -> None:
        """Reads what is not read yet. Before a checkpoint: a diverged state must not become one."""
        if self._pending is None:
            return
        (step, metrics), self._pending = self._pending, None
        values = {name: float(np.asarray(value)) for name, value in metrics.items()}
        for name in FINITE:
            if not math.isfinite(values.get(name, 0.0)):
                raise Diverged(step, name, values[name])
        self._means.add(values)
        self._bar.update()
        if self._clock is None:
            self._clock = time.perf_counter()
        else:
            self._steps += 1
        if step % self.every == 0 or step == self.total:
            self._write(step)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps, as JSON: sums since the last line. Flush first."""
        return self._means.state()

    def images(self, step: int, name: str, grid: np.ndarray) -> None:
        """Keeps a grid of samples, uint8 [H, W, 3]: `name/STEP.png`, and in TensorBoard."""
        if not self.writes:
            return
        (self.folder / name).mkdir(exist_ok=True)
        images.save_png(self.folder / name / f"{step:08}.png", grid, f"{name}, step {step}")
        if self._board:
            self._board.image(step, name, grid)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What is done inside, such as sampling or saving, does not count as training time."""
        self.flush()
        start = time.perf_counter()
        yield
        if self._clock is not None:
            self._clock += time.perf_counter() - start

    def close(self) -> None:
        """Reads what is not read yet, and closes the files."""
        try:
            self.flush()
        finally:
            self._bar.close()
            for file in (self._file, self._board):
                if file:
                    file.close()

    def __enter__(self) -> "Log":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: Any, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # what is pending may never come, or be worth nothing
            self._pending = None
        self.close()

    def _write(self, step: int) -> None:
        """Closes an interval: its means and speed to the file, TensorBoard and the bar."""
        means, times = self._means.take(), self._times()
        shown = {"loss": means.get("loss"), "images/s": times.get("images_per_second")}
        self._bar.set_postfix({n: f"{v:.4g}" for n, v in shown.items() if v is not None})
        if self._file:
            self._file.write(line({"step": step} | means | times))
            self._file.flush()
        if self._board:
            self._board.scalars(step, means | times)

    def _times(self) -> dict[str, float]:
        """Speed since the last line; nothing if no whole step was timed."""
        if self._clock is None or not self._steps:
            return {}
        start, self._clock = self._clock, time.perf_counter()
        pace, self._steps = self._steps / max(self._clock - start, 1e-9), 0
        times = {"images_per_second": pace * self.batch_size, "flops_per_second": pace * self.flops}
        if self.peak:
            times["mfu"] = pace * self.needed / self.peak
        return times


class Profiler:
    """A trace of `count` steps from step `first` on, in `folder/profile`; of none if count is 0."""

    def __init__(self, folder: Path, first: int, count: int):
        self.folder, self.steps = folder / "profile", range(first, first + count)
        self.running = False

    def before(self, step: int, done: Any = None) -> None:
        """To be called before each step; `done` are arrays of the step before, to wait for."""
        if self.running and step not in self.steps:
            self.stop(done)
        elif step in self.steps and not self.running:
            jax.profiler.start_trace(str(self.folder))
            self.running = True

    def stop(self, done: Any = None) -> None:
        """Ends the trace, if there is one, after the device has made `done`."""
        if self.running:
            jax.block_until_ready(done)
            jax.profiler.stop_trace()
            self.running = False

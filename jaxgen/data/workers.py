"""Threads and processes that prepare pieces of batches ahead of training, by grain."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any

from jaxgen.data.order import ENDLESS
from jaxgen.types import UserError

# Of a job or a terminal that ends; Windows has some of them alone.
UNHEARD = [getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, n)]


def check_grain() -> None:
    """UserError, with the way out, where grain is not installed."""
    try:
        import grain  # noqa: F401
    except ImportError:
        raise UserError("reading training data needs grain: pip install 'jaxgen[data]'") from None


def read_ahead(
    make: Callable[[int], Any], start: int, ahead: int, workers: int, threads: int
) -> Any:
    """An iterator over `make(start)`, `make(start + 1)`, ... without end.

    Pieces are dealt to the workers in turn, so their number does not change the order.

    Args:
        make: a function of the piece's number; picklable, if there are workers.
        ahead: how many pieces are ready in advance; beside them each thread has one in hand.
        workers: processes; none reads in this one.
        threads: of each process; none makes a piece when it is asked.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags, which nobody parses here
        flags.FLAGS.mark_as_parsed()
    pieces = grain.MapDataset.range(start, ENDLESS).map(make)
    held = (-(-ahead // max(1, workers)) + threads) if threads else 0
    reading = pieces.to_iter_dataset(grain.ReadOptions(threads, held))
    return iter(reading.mp_prefetch(grain.MultiprocessingOptions(workers), _serve))


@contextmanager
def lost() -> Iterator[None]:
    """UserError, so that a run is saved, where a worker dies while it is waited for."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("Worker process was terminated"):  # grain has no type for it
            raise
        raise UserError(
            "a process that reads data was ended from outside, by lack of memory perhaps: "
            "fewer data.workers need less"
        ) from None


@contextmanager
def begun_deaf() -> Iterator[None]:
    """Processes begun inside are deaf to the signals of `_serve` from their first instant.

    They inherit the mask of this thread, which hears again what it is sent when the block ends.
    """
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # it would lift the mask when it begins, inside
    before = signal.pthread_sigmask(signal.SIG_BLOCK, UNHEARD)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _serve(worker: int, workers: int) -> None:
    """Begins a worker: signals are for the process that it serves, which it does not outlive.

    A cluster sends SIGTERM to all processes of a job at once; the run still wants its last batch.
    """
    for number in UNHEARD:
        signal.signal(number, signal.SIG_IGN)
    served = multiprocessing.parent_process()

    def follow() -> None:
        if served is not None:
            served.join()
            os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def end(reading: list[Any]) -> None:
    """Ends what the one iterator in the list began, and empties it.

    Nothing may hold the iterator afterwards: grain's own finalizer fails when the program exits.
    """
    while reading:
        reading.pop().close()

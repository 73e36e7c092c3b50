"""Threads and processes that prepare batches ahead of training, by grain."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from typing import Any

from jaxgen.data.order import ENDLESS
from jaxgen.types import UserError


def check_grain() -> None:
    """UserError, with the way out, where grain is not installed."""
    try:
        import grain  # noqa: F401
    except ImportError:
        raise UserError("reading training data needs grain: pip install 'jaxgen[data]'") from None


def read_ahead(make: Callable[[int], Any], start: int, workers: int, threads: int) -> Any:
    """An iterator over `make(start)`, `make(start + 1)`, ... without end.

    Whole batches are dealt to the workers in turn, so their number does not change the order.

    Args:
        make: a function of the batch's number; picklable, if there are workers.
        workers: processes; none reads in this one.
        threads: of each process, each with one batch in hand; none makes a batch when it is asked.
    """
    import grain
    from absl import flags

    if not flags.FLAGS.is_parsed():  # grain's workers read absl's flags, which nobody parses here
        flags.FLAGS.mark_as_parsed()
    batches = grain.MapDataset.range(start, ENDLESS).map(make)
    reading = batches.to_iter_dataset(grain.ReadOptions(threads, threads))
    return iter(reading.mp_prefetch(grain.MultiprocessingOptions(workers), _serve))


def _serve(worker: int, workers: int) -> None:
    """Begins a worker: Ctrl-C is for the process that it serves, which it does not outlive."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
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

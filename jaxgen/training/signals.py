"""Signals that ask a run to stop, which then saves itself first."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax


@contextmanager
def caught() -> Iterator[threading.Event]:
    """An event that SIGTERM, Ctrl-C or the end of a terminal (SIGHUP) sets.

    A second Ctrl-C stops at once. Under nohup the terminal may end.
    """
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stopped
        return

    def stop(number: int, frame: Any) -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        if jax.process_count() > 1:
            # SIGTERM is the runtime's there, which lets all processes stop at one step.
            signal.raise_signal(signal.SIGTERM)
        else:
            stopped.set()

    numbers = [signal.SIGINT]
    if jax.process_count() == 1:
        numbers.append(signal.SIGTERM)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as nohup sets it
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, stop) for number in numbers}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

"""Processes that read data: what they inherit."""

import multiprocessing
import signal
import subprocess
import sys

from jaxgen.data import workers

MASK = """
import multiprocessing, signal
from jaxgen.data import workers

def tell():
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    print(sorted(int(s) for s in mask), flush=True)

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    with workers.begun_deaf():
        context.Event()  # begins the tracker of resources, as grain does
        process = context.Process(target=tell)
        process.start()
    process.join()
    tell()
"""


def test_a_process_is_deaf_from_its_first_instant(tmp_path):
    script = tmp_path / "deaf.py"
    script.write_text(MASK)
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=60)
    deaf = sorted(int(number) for number in workers.UNHEARD)
    assert done.stdout.splitlines() == [str(deaf), "[]"], done.stderr
    assert signal.SIGTERM in workers.UNHEARD
    assert multiprocessing.active_children() == []

"""Training runs as processes of their own, which tests kill, stop and compare."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

ROOT = Path(__file__).parents[2]
CONFIG = """
from pathlib import Path
from jaxgen.training.recipe import EMA, AdamW, Images, Samples, TextToImage, Train

config = Train(
    task=TextToImage(model="{root}/tests/assets/tiny"),
    data=Images(source="{data}", size=32, crop="random", flip=True),
    optimizer=AdamW(learning_rate=1e-3, epsilon=1e-4),
    ema=EMA(decay=0.9),
    batch_size=8,
    steps={steps},
    save_every=3,
    log_every=2,
)
"""


class Runs:
    """A config on a folder of pictures, and runs of it that share what is compiled."""

    def __init__(self, folder, data, steps=16):
        self.folder, self.steps = folder, steps
        self.config = folder / "config.py"
        self.config.write_text(CONFIG.format(root=ROOT, data=data, steps=steps))

    def start(
        self, out, *options, process=0, of=1, port=0, devices=1, program="train/main.py", last=()
    ):
        """A process of a run that writes to `out`; of several, one, with options of its own."""
        environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": str(self.folder / "cache"),
            "JAX_NUM_CPU_DEVICES": str(devices),
            "PYTHONPATH": str(ROOT),
        }
        if of > 1:
            environment |= {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(of),
                "JAX_PROCESS_ID": str(process),
            }
        command = [sys.executable, str(ROOT / program), str(self.config)]
        return subprocess.Popen(
            [*command, "--out", str(out), *options, *last],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def finish(self, out, *options, **where):
        """Runs to the end; what it said."""
        process = self.start(out, *options, **where)
        said = process.communicate(timeout=600)[0]
        assert process.returncode == 0, said
        return said

    def together(self, out, *options, of=2, stop=None, code=0, each=((), ()), **how):
        """Several processes to the end, or to a signal to one of them: what each said.

        `each` are options of one process alone, and `code` is what all of them exit with.
        """
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        all_of_them = [
            self.start(out, *options, process=i, of=of, port=port, last=each[i], **how)
            for i in range(of)
        ]
        if stop is not None:
            wait_for_line(out, stop, all_of_them[0])
            all_of_them[-1].send_signal(signal.SIGTERM)
        said = [process.communicate(timeout=600)[0] for process in all_of_them]
        assert [process.returncode for process in all_of_them] == [code] * of, said
        return said


def wait_for_line(out, lines, process, seconds=300):
    """Until a run has written so many lines of metrics, or has ended."""
    deadline = time.monotonic() + seconds
    path = out / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.read_text().count("\n") >= lines:
            return
        time.sleep(0.01)
    assert time.monotonic() < deadline, "no progress"


def metrics(out):
    """The lines of a run, without what tells of time."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        for name in ("images_per_second", "flops_per_second", "mfu"):
            line.pop(name, None)
    return lines


def tensors(out):
    """Everything in the model folder that a run ended with, by file and key."""
    found = {}
    for path in sorted((out / "model").rglob("*.safetensors")):
        found |= {f"{path.parent.name}/{key}": value for key, value in load_file(path).items()}
    assert found
    return found


def assert_same(first, second):
    """Two runs ended in the same bits and wrote the same metrics."""
    assert metrics(first) == metrics(second)
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    for key in one:
        np.testing.assert_array_equal(one[key], two[key], err_msg=key)


def worst(first, second):
    """The largest difference of two runs' tensors, over the largest value of each."""
    one, two = tensors(first), tensors(second)
    assert one.keys() == two.keys()
    return max(float(np.abs(one[k] - two[k]).max() / np.abs(one[k]).max()) for k in one)

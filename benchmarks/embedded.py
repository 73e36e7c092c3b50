"""How long a newcomer waits: whole commands on the embedded model, until the pictures are there.

    python benchmarks/embedded.py

`python sample/demo.py`, which is what `make demo` runs once all is installed, and one prompt of the
README's. Each is a process of its own: it starts, loads, compiles or reads what was compiled,
samples and writes. Cold is with an empty compile cache, warm the same once more. Prints Markdown.
"""

import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

from sample import ROOT, describe_machine

PROMPT = "a red apple left of an owl, flat style, on a blue background"
COMMANDS = {
    "python sample/demo.py": (str(ROOT / "sample" / "demo.py"),),
    f'jaxgen sample "{PROMPT}"': ("-m", "jaxgen", "sample", PROMPT),
}


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    runs: int = 3
    """Cold and warm runs of each command, whose medians count."""


def seconds(words: tuple[str, ...], home: Path) -> float:
    """Wall time of one process, whose compile cache and pictures are in the folder `home`."""
    environment = os.environ | {"XDG_CACHE_HOME": str(home), "PYTHONPATH": str(ROOT)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # which would be another cache
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *words], cwd=home, env=environment, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(f"{' '.join(words)}: {done.stderr}")
    return time.perf_counter() - start


def main(bench: Bench) -> None:
    if bench.runs < 1:
        sys.exit(f"embedded: runs {bench.runs} is not from 1")
    print(describe_machine(), flush=True)
    print("\n| command | cold compile cache | warm |\n|---|---|---|", flush=True)
    for name, words in COMMANDS.items():
        found = []
        for _ in range(bench.runs):
            with tempfile.TemporaryDirectory() as home:
                found.append([seconds(words, Path(home)) for _ in ("cold", "warm")])
        cold, warm = (statistics.median(some) for some in zip(*found))
        print(f"| `{name}` | {cold:.1f} s | {warm:.1f} s |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

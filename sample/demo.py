"""What `make demo` runs: a grid of pictures from a model in this repository.

The embedded model does not ship yet. Until it does, the demo samples the random-weight miniature
that the tests use: its pictures are coloured noise, and mean that the whole path works.
"""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "tests" / "assets" / "tiny"
PROMPTS = ["a red apple", "an owl in the snow", "a (blue:1.3) boat", "two foxes"]


def main() -> None:
    out = Path("demo")
    print("The weights of this model are random: expect coloured noise, not an apple.")
    command = [sys.executable, "-m", "jaxgen", "sample", *PROMPTS, "--count", "4"]
    command += ["--model", str(TINY), "--batch", "8", "--out", str(out)]
    print("$ jaxgen " + " ".join(f'"{c}"' if " " in c else c for c in command[3:]))
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()

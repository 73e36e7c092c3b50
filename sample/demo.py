"""What `make demo` runs: a grid of pictures from the model in this repository.

    python sample/demo.py

Each row of the grid has a prompt of its own, each column a seed.
"""

import subprocess
import sys

PROMPTS = [
    "a red apple left of an owl, flat style, on a blue background",
    "a pine tree to the right of a fox, 3D style, on a blue striped background",
    "a cactus above a crab, flat style, on a yellow striped background",
    "a panda, flat style, on a pink background",
]


def main() -> None:
    command = [sys.executable, "-m", "jaxgen", "sample", *PROMPTS, "--count", "4"]
    command += ["--guidance", "4", "--batch", "16", "--out", "demo"]
    print("$ jaxgen " + " ".join(f'"{c}"' if " " in c else c for c in command[3:]), flush=True)
    sys.exit(subprocess.run(command).returncode)


if __name__ == "__main__":
    main()

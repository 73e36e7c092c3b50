"""Puts the embedded model together: jaxgen/assets/mini from what its runs ended with, in float16.

    python train/ship_mini.py runs/mini_unet/model --clip runs/mini_clip/model/clip

All of it or nothing: it is whole, and read once, before it takes the place of what ships. Without
`--clip` the one that ships stays.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

from jaxgen import load, save
from jaxgen.evaluation.clip import open_clip
from jaxgen.load import open_model
from jaxgen.refs import EMBEDDED
from jaxgen.types import UserError
from jaxgen.weights import files


@dataclass(frozen=True)
class Options:
    """What ships."""

    model: tyro.conf.Positional[Path]
    """The model folder of a run of configs/mini_unet.py."""
    clip: Path | None = None
    """The CLIP folder of a run of configs/mini_clip.py."""
    out: Path = EMBEDDED


def halve(array: jax.Array | np.ndarray) -> np.ndarray:
    """float16; UserError for a number that it cannot hold."""
    half = np.asarray(array).astype(np.float16)
    if not np.isfinite(half).all():
        raise UserError("a weight is too large for float16")
    return half


def halve_clip(folder: Path, out: Path) -> None:
    """The CLIP folder in float16."""
    halves = {k: halve(t.numpy()) for k, t in files.open_folder(folder, "model").items()}
    entries = ((key, lambda half=half: half, half.nbytes) for key, half in halves.items())
    files.save_folder(out, "model", entries)
    for path in folder.glob("*"):
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)


def main(options: Options) -> None:
    model, params = load(options.model)
    with tempfile.TemporaryDirectory(dir=options.out.parent, prefix=".mini-") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        save(model, jax.tree.map(halve, params), new)
        halve_clip(options.clip or options.out / "clip", new / "clip")
        open_model(new), open_clip(new / "clip")
        for name in ("README.md", "LICENSE"):
            if (options.out / name).is_file():
                shutil.copy(options.out / name, new / name)
        if options.out.exists():
            options.out.rename(old)
        new.rename(options.out)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

"""Puts the embedded model together: jaxgen/assets/mini from what its runs ended with, in float16.

    python train/ship_mini.py runs/mini_unet/model --clip runs/mini_clip/model/clip

Parts that are not named stay as they ship.
"""

import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro

from jaxgen import load, save
from jaxgen.load import EMBEDDED
from jaxgen.weights import files


@dataclass(frozen=True)
class Options:
    """What ships."""

    model: tyro.conf.Positional[Path]
    """The model folder of a run of configs/mini_unet.py."""
    clip: Path | None = None
    """The CLIP folder of a run of configs/mini_clip.py."""
    out: Path = EMBEDDED


def halve_clip(folder: Path, out: Path) -> None:
    """The CLIP folder in float16."""
    halves = {
        k: t.numpy().astype(np.float16) for k, t in files.open_folder(folder, "model").items()
    }
    entries = ((key, lambda half=half: half, half.nbytes) for key, half in halves.items())
    files.save_folder(out, "model", entries)
    for path in folder.glob("*"):
        if path.suffix != ".safetensors":
            shutil.copy(path, out / path.name)


def main(options: Options) -> None:
    options.out.mkdir(parents=True, exist_ok=True)
    model, params = load(options.model)
    params = jax.tree.map(lambda x: x.astype(jnp.float16), params)
    with tempfile.TemporaryDirectory(dir=options.out.parent) as scratch:
        new = Path(scratch) / "new"
        save(model, params, new)
        if options.clip:
            halve_clip(options.clip, new / "clip")
        for path in new.iterdir():
            there = options.out / path.name
            if there.is_dir():
                shutil.rmtree(there)
            path.rename(there)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

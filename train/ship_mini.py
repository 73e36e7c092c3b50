"""Puts the embedded model together: jaxgen/assets/mini from what its runs ended with, in float16.

    python train/ship_mini.py runs/mini_unet/model --clip runs/mini_clip/model/clip

All of it or nothing: it is whole, and read once, before it takes the place of what ships, or of
`--out`. Without `--clip` the one that is there stays, or else comes from the embedded model, as
does the artwork's licence. A card that is there stays; a new one says how the model was made.
"""

import shutil
import sys
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
from jaxgen.save import check_new
from jaxgen.types import UserError
from jaxgen.weights import files

CARD = """Made by train/ship_mini.py from {model}, of the data of `emoji_scenes`, whose artwork is
under the licence beside this file. Figures: `python benchmarks/quality.py --model` and this folder.
"""


@dataclass(frozen=True)
class Options:
    """What ships."""

    model: tyro.conf.Positional[Path]
    """The model folder of a run of configs/mini_unet.py."""
    clip: Path | None = None
    """The CLIP folder of a run of configs/mini_clip.py."""
    out: Path = EMBEDDED
    """A folder, new or one that is replaced; its card and licence stay."""


def halve(array: jax.Array | np.ndarray) -> np.ndarray:
    """float16; UserError for a number that it cannot hold."""
    with np.errstate(over="ignore"):
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


def kept(options: Options, name: str) -> Path:
    """A file or folder of what is replaced, or else of the embedded model."""
    mine = options.out / name
    return mine if mine.exists() else EMBEDDED / name


def main(options: Options) -> None:
    out = options.out
    if not (out / "model_index.json").is_file():
        check_new(out)
    model, params = load(options.model)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=out.parent, prefix=".mini-") as scratch:
            new, old = Path(scratch) / "new", Path(scratch) / "old"
            save(model, jax.tree.map(halve, params), new)
            halve_clip(options.clip or kept(options, "clip"), new / "clip")
            for path in new.rglob("*.safetensors"):
                files.write_sum(path)
            open_model(new), open_clip(new / "clip")
            shutil.copy(kept(options, "LICENSE.artwork"), new / "LICENSE.artwork")
            card = out / "README.md"
            text = card.read_text("utf-8") if card.is_file() else CARD.format(model=options.model)
            (new / "README.md").write_text(text, "utf-8")
            replaced = out.exists()
            if replaced:
                out.rename(old)
            try:
                new.rename(out)
            except BaseException:
                if replaced:
                    old.rename(out)
                raise
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"ship_mini: {error}", file=sys.stderr)
        sys.exit(2)

"""What the embedded model's autoencoder makes of scenes that it has not seen.

    python benchmarks/reconstruction.py
    python benchmarks/reconstruction.py --judge --splits test --inception inception.safetensors

PSNR and SSIM of scenes of emoji_scenes' test split, and of subjects that no training shows, coded
to the mean of the posterior and decoded. With `--judge` also what benchmarks/quality.py asks of
samples: what coding alone costs. Prints Markdown.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import tyro

import jaxgen
from jaxgen.conditioning import unit
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.denoiser import Model
from jaxgen.evaluation import report
from jaxgen.evaluation.fidelity import psnr, ssim
from jaxgen.evaluation.report import Judges
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.types import Params, UserError

BATCH = 50


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str | None = None
    """What `jaxgen.load` takes; the embedded model by default."""
    count: int = 500
    """Scenes of each split."""
    splits: tuple[str, ...] = ("test", "held")
    judge: bool = False
    """Whether subjects, styles and distances of the copies are judged, too."""
    inception: Path | None = None
    """For FID and KID of what is judged, as train/port_inception.py makes it."""


def copies(model: Model, params: Params, pictures: np.ndarray) -> np.ndarray:
    """Pictures uint8 [N, 64, 64, 3] there and back."""

    @jax.jit
    def code(batch: jax.Array) -> jax.Array:
        mean, _ = model.vae.posterior(params["vae"], unit(batch))
        return model.vae.decode(params["vae"], model.vae.config.scaling_factor * mean)

    parts = [code(pictures[i : i + BATCH]) for i in range(0, len(pictures), BATCH)]
    levels = 127.5 * (np.concatenate([np.asarray(part) for part in parts]) + 1)
    return np.rint(levels).clip(0, 255).astype(np.uint8)


def main(bench: Bench) -> None:
    if bench.inception and not bench.judge:
        raise UserError("--inception is for what is judged; add --judge")
    model, params = jaxgen.load(bench.model)
    judges = Judges.read(EMBEDDED_CLIP, bench.inception) if bench.judge else None
    judged = {}
    print(f"{bench.count} scenes of each split\n")
    print("| | PSNR | SSIM |\n|---|---|---|")
    for split in bench.splits:
        scenes = EmojiScenes(f"emoji_scenes:{split}")
        read, captions = report.read_all(scenes, bench.count)
        pictures = np.stack(read)
        made = copies(model, params, pictures)
        quality, likeness = psnr(made, pictures).mean(), ssim(made, pictures).mean()
        print(f"| {split} | {quality:.2f} dB | {likeness:.3f} |", flush=True)
        if judges:
            others, _ = report.read_all(scenes, bench.count, last=True)
            name = f"copies of {split}"
            judged[name] = report.evaluate(judges, list(made), captions, others, progress=True)
    if judged:
        print(f"\n{report.table(judged)}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except UserError as error:
        print(f"reconstruction: {error}", file=sys.stderr)
        sys.exit(2)

"""How well the embedded model does what prompts say: the table of its card.

    python benchmarks/quality.py

Samples the captions of 500 scenes of emoji_scenes' test split, which no training sees, and judges
the pictures; beside them the real scenes of these captions (the ceiling), and real scenes under
each other's captions (chance; of two that are shown, one is left of the other by chance in half).
Rare subjects have a table of their own, from test_even. "Asked" is how often captions ask for a
thing; where a column differs (of two shown, which only pictures that show both are asked), its cell
says so. The CLIP score is not independent: the model's text encoder began as that CLIP's; nor is
KID in its features, which needs no InceptionV3. Some minutes on two cores. Prints Markdown.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import tyro

from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import report
from jaxgen.evaluation.report import Judges, Report
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.save import check_new
from jaxgen.types import UserError

LATENTS = (16, 16, 4)


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str | None = None
    """What `jaxgen sample --model` takes; the embedded model by default."""
    count: int = 500
    """Prompts of each split."""
    steps: int = 20
    guidance: float = 4.0
    batch: int = 20
    seed: int = 0
    splits: tuple[str, ...] = ("test", "test_even")
    inception: Path | None = None
    """For FID and KID, as train/port_inception.py makes it."""
    out: Path | None = None
    """Where the samples stay; by default they do not."""


def sampled(bench: Bench, captions: list[str], out: Path) -> Path:
    """The captions as prompts, one picture each from noise of its own, in a new folder."""
    out.mkdir(parents=True, exist_ok=True)
    prompts = out / "prompts.txt"
    prompts.write_text("\n".join(captions) + "\n", "utf-8")
    command = [sys.executable, "-m", "jaxgen", "sample", "--prompts", str(prompts)]
    noise = np.random.default_rng(bench.seed).standard_normal((len(captions), *LATENTS), np.float32)
    np.save(out / "noise.npy", noise)  # one seed has one noise for all prompts
    command += ["--latents", str(out / "noise.npy")]
    command += ["--steps", str(bench.steps), "--out", str(out)]
    command += ["--model", bench.model] if bench.model else []
    command += ["--guidance", str(bench.guidance), "--batch", str(bench.batch)]
    if code := subprocess.run(command).returncode:
        sys.exit(code)  # it has said why
    return out


def chance(judges: Judges, images: list[np.ndarray], captions: list[str]) -> Report:
    """Pictures under each other's captions; of two that happen to be shown there are too few."""
    found = report.evaluate(judges, images, [*captions[1:], captions[0]])
    right = {n: counts for n, counts in found.right.items() if not n.endswith("of two shown")}
    return replace(found, right=right)


def main(bench: Bench) -> None:
    if bench.out is not None:
        for split in bench.splits:  # samples would be added to those of another model
            check_new(bench.out / split)
    judges = Judges.read(EMBEDDED_CLIP, bench.inception)
    for split in bench.splits:
        scenes = EmojiScenes(f"emoji_scenes:{split}")
        if bench.count < 2:
            raise UserError(f"count {bench.count} is not from 2")
        if 2 * bench.count > len(scenes):
            raise UserError(
                f"count {bench.count} is over {len(scenes) // 2}: half of {scenes.ref} are "
                "prompts, and the other half what they are compared with"
            )
        images, captions = report.read_all(scenes, bench.count)
        # Real scenes that are neither those nor seen in training, as a measure of distances.
        others, _ = report.read_all(scenes, bench.count, last=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = sampled(bench, captions, (bench.out or Path(scratch)) / split)
            made, prompts = report.read_all(report.open_pictures(str(folder)), bench.count)
        assert prompts == captions
        columns = {
            "samples": report.evaluate(judges, made, captions, others, progress=True),
            "real scenes": report.evaluate(judges, images, captions, others, progress=True),
            "chance": chance(judges, images, captions),
        }
        print(f"\n{split}: {bench.count} prompts, {bench.steps} steps, guidance {bench.guidance}\n")
        print(report.table(columns))


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except UserError as error:
        print(f"quality: {error}", file=sys.stderr)
        sys.exit(2)

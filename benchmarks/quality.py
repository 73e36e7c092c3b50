"""How well the embedded model does what prompts say: the table of its card.

    python benchmarks/quality.py

Samples the captions of 500 scenes of emoji_scenes' test split, which no training sees, and judges
the pictures; beside them the real scenes of these captions (the ceiling), and real scenes under
each other's captions (chance; of two that are shown, one is left of the other by chance in half).
Rare subjects have a table of their own, from test_even. The CLIP score is not independent: the
model's text encoder began as that CLIP's. Some minutes on two cores. Prints Markdown.
"""

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import report
from jaxgen.evaluation.report import Report
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.save import check_new

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
    check_new(out)  # samples would be added to those of another model
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
    subprocess.run(command, check=True)
    return out


def table(columns: dict[str, Report]) -> str:
    """One row for each thing that captions ask for."""
    names = list(columns["samples"].right)
    lines = [f"| | asked | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        found = [column.right.get(name, (0, 0)) for column in columns.values()]
        shares = [f"{right / asked:.1%}" if asked else "" for right, asked in found]
        shares[-1] = "50%" if name.endswith("of two shown") else shares[-1]
        lines.append(f"| {name} | {found[0][1]} | {' | '.join(shares)} |")
    for name, title in {"clip_score": "CLIP score", "fid": "FID"}.items():
        values = [getattr(column, name) for column in columns.values()]
        if any(value is not None for value in values):
            shown = ["" if value is None else f"{value:.2f}" for value in values]
            lines.append(f"| {title} | | {' | '.join(shown)} |")
    if any(column.kid for column in columns.values()):
        shown = [f"{1000 * c.kid[0]:.2f}" if c.kid else "" for c in columns.values()]
        lines.append(f"| KID x 1000 | | {' | '.join(shown)} |")
    return "\n".join(lines)


def main(bench: Bench) -> None:
    judges = report.Judges.read(EMBEDDED_CLIP, bench.inception)
    for split in bench.splits:
        scenes = EmojiScenes(f"emoji_scenes:{split}")
        images, captions = report.read_all(scenes, bench.count)
        # Real scenes that are neither those nor seen in training, as a measure of distances.
        others, _ = report.read_all(scenes, bench.count, last=True)
        with tempfile.TemporaryDirectory() as scratch:
            folder = sampled(bench, captions, (bench.out or Path(scratch)) / split)
            made, prompts = report.read_all(report.open_pictures(str(folder)), bench.count)
        assert prompts == captions
        columns = {
            "samples": report.evaluate(judges, made, captions, others),
            "real scenes": report.evaluate(judges, images, captions, others),
            "chance": report.evaluate(judges, images, [*captions[1:], captions[0]]),
        }
        print(f"\n{split}: {bench.count} prompts, {bench.steps} steps, guidance {bench.guidance}\n")
        print(table(columns))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

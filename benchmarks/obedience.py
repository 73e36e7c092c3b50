"""Whether the embedded model's ControlNets are followed: the table of their cards.

    python benchmarks/obedience.py

Samples the captions of 500 scenes of emoji_scenes' test split, which no training sees, with each
scene's own hint and without; beside them the real scenes (the ceiling), and real scenes under each
other's hints (chance). Edges are found in all of them as emoji_scenes finds them, and compared with
the line art of the hint to a pixel; segmentation is the judge's, which learned from real scenes
alone, at its cells of two pixels. KID is against held scenes (`--inception`), with its standard
error. Ten minutes on two cores. Prints Markdown.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tyro

import jaxgen
from jaxgen.data.annotators import maps
from jaxgen.data.emoji_scenes import drawing
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import judge, obedience, report
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.types import Params

COLUMNS = {"edges": "lines", "segmentation": "segmentation"}  # of the data, by ControlNet
NAMES = {"edges": "F1 of edges, to one pixel", "segmentation": "mean IoU of segmentation"}


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str | None = None
    """What `jaxgen.load` takes; the embedded model by default."""
    controls: tuple[str, ...] = tuple(COLUMNS)
    """Which of: edges segmentation; or, as NAME=FOLDER, ones that are not shipped."""
    count: int = 500
    steps: int = 20
    guidance: float = 4.0
    scale: float = 1.0
    batch: int = 20
    inception: Path | None = None
    """For KID, as train/port_inception.py makes it."""


def hints_of(scenes: EmojiScenes, count: int, column: str) -> tuple[list, list, list, list]:
    """Pictures, captions, hints, and what the hints are of: labels, or lines."""
    examples = [scenes.read(i) for i in range(count)]
    images, captions, marks = ([e[k] for e in examples] for k in ("image", "caption", column))
    if column != "segmentation":
        return images, captions, marks, [mark[..., 0] > 127 for mark in marks]
    colours = maps.distinct(256)
    hints = [maps.segmentation(mark.astype(np.int32), colours) for mark in marks]
    return images, captions, hints, [obedience.cells(mark.astype(np.int32)) for mark in marks]


def sampled(bench: Bench, captions: list[str], refs: list[str], hints: list) -> list:
    """A picture for each caption, from noise of its own and with its own hint, if there are any."""
    model, params = jaxgen.load(bench.model, control=refs)
    noise = np.random.default_rng(0).standard_normal((len(captions), 16, 16, 4), np.float32)
    control = [jaxgen.Hint(np.stack(hints), bench.scale)] if refs else []
    made = jaxgen.sample(
        model,
        params,
        captions,
        steps=bench.steps,
        guidance=bench.guidance,
        latents=noise,
        control=control,
        batch=bench.batch,
        progress=True,
    )
    return list(made)


def measured(column: str, images: list, wanted: list, judges: Params) -> float:
    """The figure of a ControlNet for pictures and what they were to follow."""
    if column == "segmentation":
        seen = judge.look(judges, images)
        return obedience.mean_iou([obedience.labels(one) for one in seen], wanted)
    found = [drawing.edges(image) > 0 for image in images]
    return float(np.mean([obedience.edge_f1(f, w) for f, w in zip(found, wanted)]))


def kid(judges: report.Judges | None, images: list, captions: list, others: list) -> str:
    """The distance from held scenes and its standard error; nothing without an InceptionV3."""
    found = report.evaluate(judges, images, captions, others).kid if judges else None
    return f"{1000 * found[0]:.2f} ± {1000 * found[1]:.2f}" if found else ""


def main(bench: Bench) -> None:
    judges = judge.read()
    inception = report.Judges.read(EMBEDDED_CLIP, bench.inception) if bench.inception else None
    scenes = EmojiScenes("emoji_scenes:test", columns=tuple(COLUMNS.values()))
    others, _ = report.read_all(scenes, bench.count, last=True)
    print(f"{bench.count} scenes, {bench.steps} steps, guidance {bench.guidance}\n")
    print("| | with | without | real scenes | chance | with / real | KID x 1000 with | without |")
    print("|---|---|---|---|---|---|---|---|")
    for control in bench.controls:
        name, _, ref = control.partition("=")
        images, captions, hints, wanted = hints_of(scenes, bench.count, COLUMNS[name])
        made = sampled(bench, captions, [ref or name], hints)
        plain = sampled(bench, captions, [], [])
        figures = [
            measured(COLUMNS[name], shown, wanted, judges) for shown in (made, plain, images)
        ]
        figures.append(measured(COLUMNS[name], images, [*wanted[1:], wanted[0]], judges))
        cells = [f"{figure:.3f}" for figure in figures] + [f"{figures[0] / figures[2]:.1%}"]
        cells += [kid(inception, shown, captions, others) for shown in (made, plain)]
        print(f"| {name}: {NAMES[name]} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

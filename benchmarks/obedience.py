"""Whether the embedded model's ControlNets are followed.

    python benchmarks/obedience.py
    python benchmarks/obedience.py --controls edges=runs/mini_edges/model
    python benchmarks/obedience.py --controls edges --count 100 --curve runs/mini_edges

Samples the captions of 500 scenes of emoji_scenes' test split, which no training sees, with each
scene's own hint and without; beside them the real scenes, and real scenes under each other's hints
(chance). Edges are found in all of them by the same annotator, emoji_scenes' own, and compared to a
pixel, near the subjects alone, since no hint tells of a background's stripes: with those of the
real scene, and with the ink of the hint. Segmentation is the judge's, which learned from real
scenes alone, at its cells of two pixels. KID is against other scenes that no training sees, in the
image features of the embedded CLIP, and with `--inception` in InceptionV3's; what control changes
of it has the bootstrap's standard error. Ten minutes on two cores. With `--curve` the figures
of a run's checkpoints as it learned, not averaged, of as many as it kept. Prints Markdown.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
import tyro
from scipy import ndimage

import jaxgen
from jaxgen.data.annotators import maps
from jaxgen.data.emoji_scenes import drawing
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.denoiser import Model
from jaxgen.evaluation import clip, distances, inception, judge, obedience, report
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.types import Params, UserError

MARGIN = 2  # pixels around a subject within which edges count


class Truth(NamedTuple):
    """What the scenes show, each a list."""

    images: list
    captions: list
    lines: list  # uint8 [64, 64, 3]
    labels: list  # int32 [64, 64]

    def hints(self, control: str) -> list:
        """As the ControlNet of this name was trained on."""
        colours = maps.distinct(256)
        drawn = [maps.segmentation(labels, colours) for labels in self.labels]
        return {"edges": self.lines, "segmentation": drawn}[control]


def edges_of_real(images: list, truth: Truth, judges: Params) -> float:
    return _f1(images, truth, [drawing.edges(real) > 0 for real in truth.images])


def ink(images: list, truth: Truth, judges: Params) -> float:
    return _f1(images, truth, [lines[..., 0] > 127 for lines in truth.lines])


def _f1(images: list, truth: Truth, wanted: list) -> float:
    square = np.ones((2 * MARGIN + 1,) * 2, bool)
    near = [ndimage.binary_dilation(labels > 0, square) for labels in truth.labels]
    found = [drawing.edges(image) > 0 for image in images]
    scores = [obedience.edge_f1(f & n, w & n) for f, w, n in zip(found, wanted, near, strict=True)]
    return float(np.mean(scores))


def subjects(images: list, truth: Truth, judges: Params) -> float:
    return obedience.mean_iou(*_cells(images, truth, judges))


def any_subject(images: list, truth: Truth, judges: Params) -> float:
    found, wanted = _cells(images, truth, judges)
    hits = sum(((f > 0) & (w > 0)).sum() for f, w in zip(found, wanted, strict=True))
    either = sum(((f > 0) | (w > 0)).sum() for f, w in zip(found, wanted, strict=True))
    return float(hits / max(either, 1))


def _cells(images: list, truth: Truth, judges: Params) -> tuple[list, list]:
    found = [obedience.labels(seen) for seen in judge.look(judges, images)]
    return found, [obedience.cells(labels) for labels in truth.labels]


FIGURES: dict[str, dict[str, Callable[[list, Truth, Params], float]]] = {
    "edges": {
        "F1 of edges, those of the real scene": edges_of_real,
        "F1 of edges, the hint's ink": ink,
    },
    "segmentation": {
        "mean IoU over subjects and background": subjects,
        "IoU of any subject": any_subject,
    },
}


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str | None = None
    """What `jaxgen.load` takes; the embedded model by default."""
    controls: tuple[str, ...] = tuple(FIGURES)
    """Which of: edges segmentation; or, as NAME=FOLDER, ones that are not shipped."""
    count: int = 500
    steps: int = 20
    guidance: float = 4.0
    scale: float = 1.0
    batch: int = 20
    inception: Path | None = None
    """InceptionV3 in safetensors, as train/port_inception.py makes it, for KID as in papers."""
    curve: Path | None = None
    """The folder of a finished run of the one control that is named; it was told to --keep many."""


def read(count: int) -> Truth:
    columns = ("lines", "segmentation")
    scenes = EmojiScenes("emoji_scenes:test", columns=columns)
    examples = [scenes.read(i) for i in range(count)]
    images, captions, lines, labels = (
        [example[name] for example in examples] for name in ("image", "caption", *columns)
    )
    return Truth(images, captions, lines, [one.astype(np.int32) for one in labels])


def sampled(bench: Bench, loaded: tuple[Model, Params], captions: list, hints: list) -> list:
    """A picture for each caption, from noise of its own and with its own hint, if there are any."""
    noise = np.random.default_rng(0).standard_normal((len(captions), 16, 16, 4), np.float32)
    made = jaxgen.sample(
        *loaded,
        captions,
        steps=bench.steps,
        guidance=bench.guidance,
        latents=noise,
        control=[jaxgen.Hint(np.stack(hints), bench.scale)] if hints else [],
        batch=bench.batch,
        progress=True,
    )
    return list(made)


Features = Callable[[list], np.ndarray]  # of pictures, [N, D], for KID


def features(bench: Bench) -> dict[str, Features]:
    """What KID is measured in, by name."""
    eyes = clip.open_clip(EMBEDDED_CLIP)
    found: dict[str, Features] = {
        "KID x 1000 in CLIP features": lambda images: clip.for_kid(clip.embed_images(eyes, images))
    }
    if bench.inception is not None:
        found["KID x 1000"] = partial(inception.features, inception.read(bench.inception))
    return found


def table(bench: Bench, truth: Truth, judges: Params) -> None:
    """All figures of all controls, with, without, of real scenes and by chance; then KID."""
    print("| | with | without | real scenes | chance | with / real |\n|---|---|---|---|---|---|")
    loaded = {}
    for control in bench.controls:
        name, _, ref = control.partition("=")
        loaded[name] = jaxgen.load(bench.model, control=[ref or name])
    plain = sampled(bench, jaxgen.load(bench.model), truth.captions, [])
    others = [*truth.images[1:], truth.images[0]]
    held, _ = report.read_all(EmojiScenes("emoji_scenes:test"), bench.count, last=True)
    views = [(what, see, see(plain), see(held)) for what, see in features(bench).items()]
    kids = []
    for name, pair in loaded.items():
        made = sampled(bench, pair, truth.captions, truth.hints(name))
        for what, figure in FIGURES[name].items():
            shown = (made, plain, truth.images, others)
            found = [figure(images, truth, judges) for images in shown]
            cells = [f"{one:.3f}" for one in found] + [f"{found[0] / found[2]:.1%}"]
            print(f"| {name}: {what} | {' | '.join(cells)} |", flush=True)
        for what, see, without, real in views:
            with_ = see(made)
            more, error = distances.kid_difference(with_, without, real)
            values = [distances.kid(some, real)[0] for some in (with_, without)] + [more, error]
            kids.append(f"| {name}: {what} | {' | '.join(f'{1000 * v:.2f}' for v in values)} |")
    print("\n| | with | without | with - without | standard error |\n|---|---|---|---|---|")
    print("\n".join(kids))


def curve(bench: Bench, truth: Truth, judges: Params, run: Path) -> None:
    """The figures of one control, by step of its training."""
    (name,) = bench.controls
    model, params = jaxgen.load(bench.model, control=[str(run / "model")])
    print(f"| step | {' | '.join(FIGURES[name])} |\n|---{'|---' * len(FIGURES[name])}|")
    for step, learned in checkpoints(run / "checkpoints"):
        loaded = model, params | {"controlnet": learned["controlnet"]}
        made = sampled(bench, loaded, truth.captions, truth.hints(name))
        found = [figure(made, truth, judges) for figure in FIGURES[name].values()]
        print(f"| {step} | {' | '.join(f'{one:.3f}' for one in found)} |", flush=True)


def checkpoints(folder: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Steps, ascending, and what had been learned by then."""
    with ocp.PyTreeCheckpointer() as reader:
        for step in sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit()):
            state = folder.resolve() / str(step) / "state"
            arrays = jax.tree.map(
                lambda _: ocp.RestoreArgs(restore_type=np.ndarray),
                reader.metadata(state).item_metadata.tree,
            )
            yield step, reader.restore(state, restore_args=arrays)["learned"]


def main(bench: Bench) -> None:
    unknown = {control.partition("=")[0] for control in bench.controls} - {*FIGURES}
    if unknown:
        raise UserError(f"controls: {min(unknown)} is not one of {', '.join(FIGURES)}")
    if bench.curve is not None and len(bench.controls) != 1:
        raise UserError("--curve is of one run; name its control (--controls edges)")
    truth, judges = read(bench.count), judge.read()
    print(f"{bench.count} scenes, {bench.steps} steps, guidance {bench.guidance}\n")
    if bench.curve is None:
        table(bench, truth, judges)
    else:
        curve(bench, truth, judges, bench.curve)


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except UserError as error:
        print(f"obedience: {error}", file=sys.stderr)
        sys.exit(2)

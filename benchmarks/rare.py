"""What SeedSelect is good for: rare subjects of the embedded model, judged from outside.

    python benchmarks/rare.py                       # both tables, 8 subjects; hours on two cores
    python benchmarks/rare.py --parts share --subjects 3 --count 4

`share`: how many pictures show the subject, by the judge of emoji_scenes, which learnt from real
scenes alone: of plain noise, after 10 and 30 iterations, from norm-aware starts, and from starts
near the seeds that 30 iterations found; with how far two pictures of a subject are apart, and
seconds for each. `classifier`: a classifier of head and rare subjects that learns from real views,
many of the one and five of the other, or also from the pictures that `jaxgen seedselect` adds;
accuracy on other real views, over three seeds. Prints Markdown for benchmarks/README.md.
"""

import itertools
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
import tyro
from PIL import Image

import jaxgen
from jaxgen import request, seedselect
from jaxgen.data import images
from jaxgen.data.emoji_scenes import artwork, captions
from jaxgen.data.emoji_scenes.artwork import Subject
from jaxgen.data.emoji_scenes.views import SubjectViews
from jaxgen.evaluation import judge
from jaxgen.evaluation.judge import CROP, Namer
from jaxgen.seedselect import Search, starts
from sample import describe_machine

PARTS = ("share", "classifier")
TEST, AGAIN = 1000, 5  # first view of the test; iterations from a start that is near already
EPOCHS, LEARNERS = 60, 3


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str | None = None
    """What `jaxgen seedselect --model` takes; the embedded model by default."""
    group: str = "tail"
    """Of the subjects: head, middle or tail."""
    subjects: int = 8
    """So many of them, evenly over the group."""
    references: int = 5
    """Views of each."""
    count: int = 8
    """Pictures of each subject, for each row of `share`."""
    steps: int = 10
    guidance: float = 4.0
    real: int = 100
    """Views of each head subject, and in the end pictures of each rare one, for `classifier`."""
    batch: int = 8
    seed: int = 0
    parts: tuple[str, ...] = PARTS
    """Which of: share classifier."""
    out: Path | None = None
    """Where pictures stay; a run that was stopped goes on in it. By default they do not."""


def main(bench: Bench) -> None:
    print(describe_machine(), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        folder = bench.out or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        if "share" in bench.parts:
            shares(bench, folder)
        if "classifier" in bench.parts:
            downstream(bench, folder)


def chosen(group: str, count: int) -> list[Subject]:
    """Subjects of a group, from its most frequent to its rarest."""
    of_group = [s for s in artwork.load().subjects if s.group == group]
    return [of_group[i] for i in np.linspace(0, len(of_group) - 1, count).round().astype(int)]


def views(subject: Subject, first: int, count: int) -> list[np.ndarray]:
    """Real pictures uint8 [64, 64, 3] of a subject."""
    source = SubjectViews(subject.name)
    return [source.read(first + i)["image"] for i in range(count)]


def shares(bench: Bench, folder: Path) -> None:
    """The table of how many pictures show what they are to show."""
    subjects = chosen(bench.group, bench.subjects)
    model, params = jaxgen.load(bench.model)
    asked = request.Request(
        prompts=[captions.noun(s) for s in subjects], steps=bench.steps, sampler="ddim",
        guidance=bench.guidance, seed=bench.seed, count=bench.count, batch=bench.batch,
    )  # fmt: skip
    checked = request.plan(model, asked)
    known = [views(s, 0, bench.references) for s in subjects]
    eyes = seedselect.open_judge(None, bench.model)

    def search(iterations: int, start: Any = "gaussian", plan: Any = checked, **more: Any) -> Any:
        """What is found, and seconds for each; the first seed is found twice, to compile."""
        how = Search(iterations=iterations, **more)
        run = lambda only: [*seedselect.select(  # noqa: E731
            model, params, plan, known, how, judge=eyes, start=start, only=only, progress=True
        )]  # fmt: skip
        run([0])
        begun = time.perf_counter()
        found = run(None)
        return found, (time.perf_counter() - begun) / len(found)

    print(f"\n{bench.group}: {', '.join(s.name for s in subjects)}; {bench.references} references")
    print(
        f"of each, {bench.count} pictures, {bench.steps} steps of DDIM, guidance {bench.guidance}"
    )
    print("\n| pictures | show the subject | apart | seconds each |\n|---|---|---|---|", flush=True)

    def row(name: str, found: Sequence[np.ndarray], seconds: float | None = None) -> None:
        each = len(found) // len(subjects)
        groups = [found[i : i + each] for i in range(0, len(found), each)]
        right = [rate(s, rows) for s, rows in zip(subjects, groups, strict=True)]
        far = np.mean([apart(rows) for rows in groups])
        took = "" if seconds is None else f"{seconds:.1f}"
        print(f"| {name} | {np.mean(right):.1%} | {far:.3f} | {took} |", flush=True)
        file = folder / f"{name.replace(' ', '_').replace(',', '')}.png"
        images.save_png(file, images.rows(groups), name)

    row("real views", [v for s in subjects for v in views(s, TEST, bench.count)])
    seeds = np.zeros(0)
    for iterations in (1, 10, 30):
        found, seconds = search(iterations)
        seeds = np.stack([one.seed for one in found])
        name = "plain noise" if iterations == 1 else f"{iterations} iterations"
        row(name, [one.image for one in found], seconds)
    unguided = request.plan(model, replace(asked, guidance=1.0))
    for name, plan in (("guided", checked), ("unguided", unguided)):
        found, seconds = search(AGAIN, "nao", plan, learning_rate=0.05)
        row(f"norm-aware, {name}", [one.image for one in found], seconds)
    near = seeds.reshape(len(subjects), bench.count, *seeds.shape[1:])

    def start(index: int) -> np.ndarray:
        mine, number = divmod(index, bench.count)
        return starts.spread(near[mine], bench.seed, number)

    found, seconds = search(AGAIN, start)
    row("bootstrapped", [one.image for one in found], seconds)


def rate(subject: Subject, pictures: Sequence[np.ndarray]) -> float:
    """How many of the pictures show a subject, by the judge."""
    number = artwork.load().number(subject.name)
    seen = judge.look(judge.read(), pictures)
    return float(np.mean([number in {f.subject for f in one.found} for one in seen]))


def apart(pictures: Sequence[np.ndarray]) -> float:
    """Root mean square difference of two pictures whose pixels are 0 to 1, on average."""
    if len(pictures) < 2:
        return 0.0
    pairs = itertools.combinations(np.stack(pictures) / 255.0, 2)
    return float(np.mean([np.sqrt(np.square(a - b).mean()) for a, b in pairs]))


def downstream(bench: Bench, folder: Path) -> None:
    """The table of classifiers."""
    rare, head = chosen(bench.group, bench.subjects), chosen("head", bench.subjects)
    for subject in rare:
        where = folder / "references" / subject.name
        where.mkdir(parents=True, exist_ok=True)
        for i, view in enumerate(views(subject, 0, bench.references)):
            images.save_png(where / f"{i}.png", view, subject.name)
    command = [sys.executable, "-m", "jaxgen", "seedselect", "a {}", "--count", str(bench.real)]
    command += ["--images", str(folder / "references"), "--out", str(folder / "augmented")]
    command += ["--steps", str(bench.steps), "--guidance", str(bench.guidance)]
    command += ["--batch", str(bench.batch), *(["--model", bench.model] if bench.model else [])]
    subprocess.run(command, check=True)

    def added(subject: Subject) -> list[np.ndarray]:
        paths = sorted((folder / "augmented" / subject.name).glob("[0-9]*.png"))
        return [np.asarray(Image.open(path).convert("RGB")) for path in paths]

    real = [views(s, 0, bench.real) for s in head] + [views(s, 0, bench.references) for s in rare]
    more = [[] for _ in head] + [added(s) for s in rare]
    again = [views(s, 0, bench.references) * (bench.real // bench.references) for s in rare]
    test = [views(s, TEST, 50) for s in head + rare]
    print(
        f"\n| learns from | {len(head)} head subjects | {len(rare)} {bench.group} |\n|---|---|---|"
    )
    for name, pictures in {
        "real views": real,
        "rare ones repeated": real[: len(head)] + again,
        "and what SeedSelect adds": [a + b for a, b in zip(real, more, strict=True)],
    }.items():
        found = np.array([accuracy(pictures, test, seed) for seed in range(LEARNERS)])
        cells = [found[:, : len(head)].mean(1), found[:, len(head) :].mean(1)]
        shown = " | ".join(f"{cell.mean():.1%} ± {cell.std():.1%}" for cell in cells)
        print(f"| {name} | {shown} |", flush=True)


def accuracy(learnt: list[list[np.ndarray]], test: list[list[np.ndarray]], seed: int) -> np.ndarray:
    """Trains a small classifier; its accuracy on each class."""
    net, rng = Namer(len(learnt)), np.random.default_rng(seed)
    x, y = labelled(learnt)
    params = net.init(jax.random.key(seed), x[:1])
    steps = EPOCHS * -(-len(x) // 64)
    optimizer = optax.adamw(optax.cosine_decay_schedule(2e-3, steps), weight_decay=1e-2)

    @jax.jit
    def learn(params: Any, state: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = net.apply(params, x)[0][:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for rows in rng.integers(len(x), size=(steps, 64)):
        flipped = np.where(rng.random((64, 1, 1, 1)) < 0.5, x[rows], x[rows, :, ::-1])
        params, state = learn(params, state, flipped, y[rows])
    predict = jax.jit(lambda x: net.apply(params, x)[0][:, 1:].argmax(-1))
    return np.array([(predict(labelled([rows])[0]) == i).mean() for i, rows in enumerate(test)])


def labelled(classes: list[list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Pictures uint8 [N, 32, 32, 3] and the numbers of their classes [N]."""
    small = [
        np.asarray(Image.fromarray(picture).resize((CROP, CROP), Image.Resampling.BOX))
        for rows in classes
        for picture in rows
    ]
    return np.stack(small), np.repeat(np.arange(len(classes)), [len(rows) for rows in classes])


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

"""What a classifier of rare subjects learns from pictures that SeedSelect adds to a few real ones.

    python benchmarks/augmented.py --subjects 4 --real 40      # half an hour on two cores

A classifier of head and rare subjects learns from real views, many of the one and five of the
other, or also from as many pictures of the rare ones as of the head: the embedded model's plain
ones, or those that `jaxgen seedselect` adds in its few-shot mode, from noise, each near those found
before, or norm-aware, each for itself; accuracy on other real views. Prints Markdown for
benchmarks/README.md.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
import optax
import tyro
from PIL import Image
from rare import TEST, chosen, views

from jaxgen.data import images
from jaxgen.data.emoji_scenes import captions
from jaxgen.evaluation.judge import CROP, Namer
from jaxgen.save import check_new
from jaxgen.seedselect import fewshot
from sample import describe_machine

LEARN, LEARNERS = 500, 3  # steps of a classifier, and how many seeds it has


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str | None = None
    """What `jaxgen seedselect --model` takes; the embedded model by default."""
    judge: Path | None = None
    """And `--judge`: the CLIP by which seeds are found; the model's own by default."""
    starts: tuple[Literal["gaussian", "nao"], ...] = ("gaussian", "nao")
    """And `--start`, one set for each."""
    variety: float = 0.9
    """And `--variety`: much, since pictures that are alike teach little."""
    group: Literal["middle", "tail"] = "tail"
    """Of the rare subjects."""
    subjects: int = 8
    """So many of them, evenly over the group, and as many of the head."""
    names: tuple[str, ...] = ()
    """These rare subjects instead."""
    references: int = 5
    """Views of each rare subject."""
    real: int = 100
    """Views of each head subject, and in the end pictures of each rare one."""
    steps: int = 10
    guidance: float = 4.0
    """Of plain pictures, and of SeedSelect's from noise; norm-aware ones are not guided."""
    batch: int = 8
    """Pictures at once."""
    seed: int = 0
    out: Path | None = None
    """Where pictures stay, a new folder; by default they do not."""


def main(bench: Bench) -> None:
    print(describe_machine(), flush=True)
    if not bench.references < bench.real <= TEST:
        sys.exit(f"--real {bench.real}: it is more than the references, and at most {TEST}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = bench.out or Path(scratch) / "out"
        check_new(folder)
        folder.mkdir(parents=True)
        rare = chosen(bench.group, bench.subjects, bench.names)
        head = chosen("head", len(rare))
        few = [views(s, 0, bench.references) for s in rare]
        added = pictures(bench, folder, [captions.noun(s) for s in rare], few)
        known = [views(s, 0, bench.real) for s in head], few
        test = [views(s, TEST, 50) for s in (*head, *rare)]
    print(f"\n{', '.join(s.name for s in (*head, *rare))}\n")
    print(
        f"| learns from | {len(head)} head subjects | {len(rare)} rare |\n|---|---|---|", flush=True
    )
    classifiers(bench, known, added, test)


def pictures(
    bench: Bench, folder: Path, prompts: list[str], few: list[list[np.ndarray]]
) -> dict[str, list[list[np.ndarray]]]:
    """What is added to the references of each rare subject, by its name in the table."""
    assert fewshot.prompts("{}", prompts) == prompts, "seedselect would ask for something else"
    for prompt, rows in zip(prompts, few, strict=True):
        where = folder / "references" / prompt
        where.mkdir(parents=True)
        for i, view in enumerate(rows):
            images.save_png(where / f"{i}.png", view, prompt)
    options = {
        "--steps": bench.steps, "--batch": bench.batch, "--seed": bench.seed,
        "--model": bench.model,
    }  # fmt: skip
    common = [str(word) for item in options.items() if item[1] is not None for word in item]

    def command(*words: Any) -> None:
        line = [sys.executable, "-m", "jaxgen", *map(str, words), *common]
        subprocess.run(line, check=True, stdout=sys.stderr)

    def read(paths: Sequence[Path]) -> list[np.ndarray]:
        return [np.asarray(Image.open(path).convert("RGB")) for path in paths]

    missing, guided = bench.real - bench.references, ["--guidance", bench.guidance]
    command("sample", *prompts, "--count", missing, "--sampler", "ddim", *guided,
            "--out", folder / "plain")  # fmt: skip
    plain = read([folder / "plain" / f"{i:05}.png" for i in range(missing * len(prompts))])
    added: dict[str, list[list[np.ndarray]]] = {
        "real views": [[] for _ in prompts],
        "and plain pictures": [plain[i * missing :][:missing] for i in range(len(prompts))],
    }
    judged = [] if bench.judge is None else ["--judge", bench.judge]
    for start in bench.starts:
        out = folder / start
        command("seedselect", "{}", "--images", folder / "references", "--out", out,
                "--count", bench.real, "--start", start, "--variety", bench.variety,
                *(guided if start == "gaussian" else []), *judged)  # fmt: skip
        found = [read(sorted((out / p).glob("[0-9]*.png"))) for p in prompts]
        added[f"and SeedSelect's, --start {start}"] = found
    return added


def classifiers(
    bench: Bench,
    known: tuple[list[list[np.ndarray]], list[list[np.ndarray]]],
    added: dict[str, list[list[np.ndarray]]],
    test: list[list[np.ndarray]],
) -> None:
    """A row for each set: accuracy on head and rare subjects."""
    many, few = known
    for name, more in added.items():
        learnt = many + [a + b for a, b in zip(few, more, strict=True)]
        found = np.array([accuracy(learnt, test, bench.seed + n) for n in range(LEARNERS)])
        cells = [found[:, : len(many)].mean(1), found[:, len(many) :].mean(1)]
        shown = " | ".join(f"{cell.mean():.1%} ± {cell.std(ddof=1):.1%}" for cell in cells)
        print(f"| {name} | {shown} |", flush=True)
    print(f"\n± over {LEARNERS} seeds of the classifier, which sees all classes as often.")


def accuracy(learnt: list[list[np.ndarray]], test: list[list[np.ndarray]], seed: int) -> np.ndarray:
    """Trains a small classifier, for which classes are as frequent; its accuracy on each."""
    net, rng = Namer(len(learnt)), np.random.default_rng(seed)
    classes = [halved(rows) for rows in learnt]
    params = net.init(jax.random.key(seed), classes[0][:1])
    rate = optax.cosine_decay_schedule(2e-3, LEARN)
    optimizer = optax.adamw(rate, weight_decay=1e-2)

    @jax.jit
    def learn(params: Any, state: Any, x: Any, y: Any) -> Any:
        def loss(params: Any) -> Any:
            logits = net.apply(params, x)[0][:, 1:]
            return optax.softmax_cross_entropy_with_integer_labels(logits, y).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state, params)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for y in rng.integers(len(classes), size=(LEARN, 64)):
        x = np.stack([classes[n][rng.integers(len(classes[n]))] for n in y])
        flipped = np.where(rng.random((64, 1, 1, 1)) < 0.5, x, x[:, :, ::-1])
        params, state = learn(params, state, flipped, y)
    predict = jax.jit(lambda x: net.apply(params, x)[0][:, 1:].argmax(-1))
    return np.array([(predict(halved(rows)) == i).mean() for i, rows in enumerate(test)])


def halved(pictures: list[np.ndarray]) -> np.ndarray:
    """As the classifier sees them, uint8 [N, 32, 32, 3]."""
    small = (Image.fromarray(p).resize((CROP, CROP), Image.Resampling.BOX) for p in pictures)
    return np.stack([np.asarray(picture) for picture in small])


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

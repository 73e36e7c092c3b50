"""What SeedSelect is good for: rare subjects of the embedded model, judged from outside.

    python benchmarks/rare.py                       # 8 subjects; two hours on two cores
    python benchmarks/rare.py --subjects 3 --count 4 --searches nao

How many pictures show the subject, by the judge of emoji_scenes, which learnt from real scenes
alone: plain ones, after 10 and 30 iterations, from norm-aware starts, and from starts near the best
seed that 30 iterations found for the subject, each of the last two as they start and after 5
iterations (`--searches` leaves out some of these rows). Beside it the mean distances to the
references that a search minimises, in meaning, by the CLIP that it is judged by, and in appearance;
how far the parts that show a subject are apart; how far a picture is from the nearest reference, in
the mean and for the nearest in twenty (a copy is near); and seconds for each once compiled, with
those of the search that a start near a seed needs. The first rows are the floor: a CLIP that finds
real views of the next subject no farther than those of the own cannot lead to it. Norm-aware starts
are not guided, and neither is the plain row at guidance 1. Chance is plain pictures judged by the
name of the next subject. Prints Markdown for benchmarks/README.md.
"""

import itertools
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import tyro

import jaxgen
from jaxgen import seedselect
from jaxgen.commands.seedselect import AGAIN, GENTLE, RATES
from jaxgen.data import images
from jaxgen.data.emoji_scenes import artwork, captions
from jaxgen.data.emoji_scenes.artwork import Subject
from jaxgen.data.emoji_scenes.views import SubjectViews
from jaxgen.evaluation import judge
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.save import check_new
from jaxgen.seedselect import Found, Search, judges, references, starts
from jaxgen.seedselect.objective import unit
from jaxgen.seedselect.references import References
from jaxgen.types import Params
from sample import describe_machine

TEST = 1000  # first view of the test
COLUMNS = (
    "pictures", "show the subject", "meaning", "appearance", "apart", "from a reference",
    "5% of them", "seconds each",
)  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    model: str | None = None
    """What `jaxgen seedselect --model` takes; the embedded model by default."""
    judge: Path | None = None
    """And `--judge`: the CLIP by which seeds are found; the model's own by default."""
    group: Literal["middle", "tail"] = "tail"
    """Of the subjects."""
    subjects: int = 8
    """So many of them, evenly over the group."""
    names: tuple[str, ...] = ()
    """These subjects instead."""
    references: int = 5
    """Views of each."""
    count: int = 8
    """Pictures of each subject, for each row."""
    steps: int = 10
    guidance: float = 4.0
    batch: int = 8
    """Pictures at once, of which the seconds are for each."""
    seed: int = 0
    searches: tuple[Literal["noise", "nao", "near"], ...] = ("noise", "nao", "near")
    """Rows beside plain pictures; near one found needs noise."""
    out: Path | None = None
    """Where pictures stay, a new folder; by default they do not."""


def main(bench: Bench) -> None:
    print(describe_machine(), flush=True)
    if "near" in bench.searches and "noise" not in bench.searches:
        sys.exit("--searches near starts near seeds that noise finds: name noise, too")
    with tempfile.TemporaryDirectory() as scratch:
        folder = bench.out or Path(scratch) / "out"
        check_new(folder)
        folder.mkdir(parents=True)
        shares(bench, folder)


def chosen(group: str, count: int, names: tuple[str, ...] = ()) -> list[Subject]:
    """Subjects by name, or of a group, from its most frequent to its rarest."""
    if names:
        art = artwork.load()
        return [art.subjects[art.number(name)] for name in names]
    of_group = [s for s in artwork.load().subjects if s.group == group]
    return [of_group[i] for i in np.linspace(0, len(of_group) - 1, count).round().astype(int)]


def views(subject: Subject, first: int, count: int) -> list[np.ndarray]:
    """Real pictures uint8 [64, 64, 3] of a subject."""
    source = SubjectViews(subject.name)
    return [source.read(first + i)["image"] for i in range(count)]


def shares(bench: Bench, folder: Path) -> None:
    """The table of how many pictures show what they are to show."""
    subjects, count = chosen(bench.group, bench.subjects, bench.names), bench.count
    model, params = jaxgen.load(bench.model)
    asked = Request(
        prompts=[captions.noun(s) for s in subjects], steps=bench.steps, sampler="ddim",
        guidance=bench.guidance, seed=bench.seed, count=count, batch=bench.batch,
    )  # fmt: skip
    checked = plan(model, asked)
    known = [views(s, 0, bench.references) for s in subjects]
    eyes = seedselect.open_judge(bench.judge, bench.model)
    meaning = judges.meaning_by(eyes, Search())

    def encode(pictures: Sequence[np.ndarray]) -> References:
        return references.encode(model, params, pictures, checked.size, meaning)

    table = Table(subjects, known, [encode(rows) for rows in known], encode, folder, judge.read())

    def search(
        name: str,
        iterations: int,
        start: Any = "gaussian",
        under: Any = checked,
        rate: float = 0.1,
        before: float = 0.0,
    ) -> tuple[list[Found], float]:
        """A row of what is found, and seconds each; an iteration of a batch before, to compile.

        `before`: seconds each of what the starts are of.
        """
        how = Search(iterations=iterations, learning_rate=rate)

        def run(how: Search, only: Sequence[int] | None) -> list[Found]:
            given = {"judge": eyes, "start": start, "only": only, "progress": True}
            return [*seedselect.select(model, params, under, known, how, **given)]

        run(replace(how, iterations=1), [0])
        begun = time.perf_counter()
        found = run(how, None)
        assert len(found) == under.total, "a seed was left out: rows would not fit their subjects"
        seconds = (time.perf_counter() - begun) / len(found) + before
        # A single iteration looks at the start itself, and its time is that of its gradient too.
        table.row(name, [one.image for one in found], seconds if iterations > 1 else None)
        return found, seconds

    print(f"\n{', '.join(s.name for s in subjects)}")
    print(f"{bench.references} references and {count} pictures of each, {bench.batch} at once;")
    print(f"{bench.steps} steps of DDIM, guidance {bench.guidance}\n")
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    real = [v for s in subjects for v in views(s, TEST, count)]
    table.row("real views", real)
    table.row("real views of the next", [*real[count:], *real[:count]])

    def plain(name: str, asked: Request) -> list[np.ndarray]:
        run = partial(jaxgen.sample, model, params, **vars(asked))
        run()
        begun = time.perf_counter()
        pictures = [*run()]
        table.row(name, pictures, (time.perf_counter() - begun) / len(pictures))
        return pictures

    pictures = plain("plain", asked)
    table.row("chance", [*pictures[count:], *pictures[:count]])
    alone = replace(asked, guidance=1.0)
    plain("plain, guidance 1", alone)
    if "noise" in bench.searches:
        search("10 iterations", 10)
        found, seconds = search("30 iterations", 30)
    for iterations in (1, AGAIN) if "nao" in bench.searches else ():
        name = "as they start" if iterations == 1 else f"{iterations} iterations"
        search(f"norm-aware, {name}", iterations, "nao", plan(model, alone), RATES["nao"])
    if "near" not in bench.searches:
        return
    groups = [[one for one in found if one.index // count == i] for i in range(len(subjects))]
    best = [min(group, key=lambda one: one.loss).seed for group in groups]

    def near(index: int) -> np.ndarray:
        mine, number = divmod(index, count)
        return starts.spread(best[mine][None], bench.seed, count + number, Search().variety)

    for iterations in (1, AGAIN):
        name = "as they start" if iterations == 1 else f"{iterations} iterations"
        search(f"near one found, {name}", iterations, near, rate=GENTLE, before=seconds)


@dataclass(frozen=True)
class Table:
    """Judges pictures of some subjects, as many of each, and prints a row."""

    subjects: list[Subject]
    references: list[list[np.ndarray]]
    known: list[References]  # the same, encoded
    encode: Callable[[Sequence[np.ndarray]], References]
    folder: Path
    params: Params  # of the judge of emoji_scenes

    def row(self, name: str, pictures: Sequence[np.ndarray], seconds: float | None = None) -> None:
        """Pictures uint8 [64, 64, 3], those of one subject after another."""
        each, crops, far = len(pictures) // len(self.subjects), [], list[float]()
        groups = [pictures[i : i + each] for i in range(0, len(pictures), each)]
        for subject, known, rows in zip(self.subjects, self.references, groups, strict=True):
            number = artwork.load().number(subject.name)
            seen = [
                {found.subject: found.box for found in one.found}
                for one in judge.look(self.params, rows)
            ]
            shown = [(p, boxes[number]) for p, boxes in zip(rows, seen) if number in boxes]
            crops.append([judge.crop(*one) for one in shown])
            far += [min(distance(picture, other) for other in known) for picture in rows]
        pairs = [distance(*pair) for parts in crops for pair in itertools.combinations(parts, 2)]
        cells = [f"{sum(map(len, crops))} of {len(pictures)}", *self.minimised(groups)]
        cells += [f"{np.mean(pairs):.3f}" if pairs else "", f"{np.mean(far):.3f}"]
        cells += [f"{np.quantile(far, 0.05):.3f}"]
        cells += ["" if seconds is None else f"{seconds:.1f}"]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        file = self.folder / f"{name.replace(',', '').replace(' ', '_')}.png"
        images.save_png(file, images.rows(groups), name)

    def minimised(self, groups: list[Sequence[np.ndarray]]) -> list[str]:
        """Mean distances of each subject's pictures to its references: meaning and appearance."""
        meaning, appearance = [], []
        for known, rows in zip(self.known, groups, strict=True):
            seen, own = self.encode(rows), unit(known.embeddings.mean(0))
            meaning += (1 - seen.embeddings @ own).tolist()
            square = (seen.latents - known.latents.mean(0)) ** 2
            appearance += square.mean((1, 2, 3)).tolist()
        return [f"{np.mean(meaning):.3f}", f"{np.mean(appearance):.3f}"]


def distance(one: np.ndarray, other: np.ndarray) -> float:
    """Root mean square difference of two pictures of a size, whose pixels are 0 to 1."""
    return float(np.sqrt(np.square((one.astype(float) - other) / 255).mean()))


if __name__ == "__main__":
    main(tyro.cli(Bench, description=__doc__))

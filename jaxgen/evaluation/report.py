"""What `jaxgen evaluate` says of pictures, as data and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxgen.data.examples import BadExample, Source
from jaxgen.data.folder import METADATA, Folder
from jaxgen.data.sources import open_source
from jaxgen.evaluation import distances, inception, judge, scenes
from jaxgen.evaluation.clip import Clip, clip_score, open_clip
from jaxgen.types import Params, UserError

SAMPLES = "samples.jsonl"  # the list that `jaxgen sample` writes
MOST = 50_000  # pictures that are held in memory at once


@dataclass(frozen=True)
class Judges:
    """What pictures are judged by, read once."""

    judge: Params
    clip: Clip | None = None
    inception: Params | None = None

    @staticmethod
    def read(clip: Path | None = None, features: Path | None = None) -> "Judges":
        """The judge of scenes, a CLIP folder, and a file of train/port_inception.py.

        Raises:
            UserError: one line, for what is missing or damaged.
        """
        return Judges(
            judge.read(),
            None if clip is None else open_clip(clip),
            None if features is None else inception.read(features),
        )


@dataclass(frozen=True)
class Report:
    """Figures of some pictures; what was not asked for, or has no meaning, is empty.

    Attributes:
        pictures: how many.
        judged: how many of them have the size that the judge sees.
        right: by what was asked, how often it was right, and asked (`scenes.right`).
        clip_score: mean of 100 max(cos, 0).
        fid: Fréchet distance of InceptionV3 features to those of other pictures.
        kid: kernel distance of the same, mean and standard deviation over random halves, which is
            no error of the mean.
    """

    pictures: int
    judged: int
    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    clip_score: float | None = None
    fid: float | None = None
    kid: tuple[float, float] | None = None


def open_pictures(ref: str) -> Source:
    """A folder that `jaxgen sample` filled, or any source of training data."""
    folder = Path(ref)
    if (folder / SAMPLES).is_file() and not (folder / METADATA).is_file():
        return Folder(folder, listing=SAMPLES)
    return open_source(ref)


def read_all(
    source: Source, count: int | None, last: bool = False
) -> tuple[list[np.ndarray], list[str]]:
    """The first pictures of a source, or its last, all without a count; and their captions.

    Raises:
        UserError: for more than there are or fit in memory, and for a bad one, by name.
    """
    most = min(len(source), MOST)
    if count is None and len(source) > MOST:
        raise UserError(f"{source.ref} has {len(source)} pictures: name a count, up to {MOST}")
    count = most if count is None else count
    if not 0 < count <= most:
        raise UserError(f"count {count} is not from 1 to {most}")
    first = len(source) - count if last else 0
    try:
        examples = [source.read(first + i) for i in range(count)]
    except BadExample as error:
        raise UserError(str(error)) from None
    if "image" not in examples[0]:
        raise UserError(f"{source.ref} holds latents, not pictures")
    return [example["image"] for example in examples], [example["caption"] for example in examples]


def evaluate(
    judges: Judges,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    against: Sequence[np.ndarray] = (),
) -> Report:
    """Judges pictures uint8 [H, W, 3] by their captions, and all of them against other pictures."""
    fit = [i for i, image in enumerate(images) if image.shape == (judge.SIDE, judge.SIDE, 3)]
    right: scenes.Shares = {}
    if fit:
        right = scenes.right(judges.judge, [images[i] for i in fit], [captions[i] for i in fit])
    score = None
    if judges.clip is not None:
        score = float(clip_score(judges.clip, images, captions).mean())
    if judges.inception is None or not len(against):
        return Report(len(images), len(fit), right, score)
    ours, theirs = (inception.features(judges.inception, some) for some in (images, against))
    distance, kernel = distances.fid(ours, theirs), distances.kid(ours, theirs)
    return Report(len(images), len(fit), right, score, distance, kernel)


def table(report: Report) -> str:
    """The figures as a table in Markdown."""
    lines = [f"| {report.pictures} pictures | right | of |", "|---|---|---|"]
    for name, (right, asked) in report.right.items():
        lines.append(f"| {name} | {right / asked:.1%} | {asked} |")
    if report.clip_score is not None:
        lines.append(f"| CLIP score | {report.clip_score:.2f} | |")
    if report.fid is not None:
        lines.append(f"| FID | {report.fid:.2f} | |")
    if report.kid is not None:
        mean, spread = report.kid
        lines.append(f"| KID x 1000, and its spread | {1000 * mean:.2f}, {1000 * spread:.2f} | |")
    if report.judged < report.pictures:
        lines.append(f"\n{report.pictures - report.judged} are not of 64x64, and were not judged.")
    return "\n".join(lines)

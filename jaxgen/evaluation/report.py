"""What `jaxgen evaluate` says of a folder of pictures, as data and as a table."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from jaxgen.data.examples import Source
from jaxgen.data.folder import METADATA, Folder
from jaxgen.data.sources import open_source
from jaxgen.evaluation import distances, inception, judge, scenes
from jaxgen.evaluation.clip import clip_score, open_clip
from jaxgen.types import UserError

SAMPLES = "samples.jsonl"  # the list that `jaxgen sample` writes
MOST = 50_000  # pictures that are held in memory at once


@dataclass(frozen=True)
class Report:
    """Figures of some pictures; what was not asked for, or has no meaning, is empty.

    Attributes:
        pictures: how many.
        right: by what was asked, how often it was right, and asked (`scenes.right`).
        clip_score: mean of 100 max(cos, 0).
        fid: Fréchet distance of InceptionV3 features to those of other pictures.
        kid: kernel distance of the same, mean and standard deviation over subsets.
    """

    pictures: int
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


def read_all(source: Source, count: int | None) -> tuple[list[np.ndarray], list[str]]:
    """The first pictures of a source, all without a count, and their captions."""
    count = len(source) if count is None else count
    if not 0 < count <= min(len(source), MOST):
        raise UserError(f"count {count} is not from 1 to {min(len(source), MOST)}")
    examples = [source.read(i) for i in range(count)]
    return [example["image"] for example in examples], [example["caption"] for example in examples]


def evaluate(
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    clip: Path | None = None,
    features: Path | None = None,
    against: Sequence[np.ndarray] = (),
) -> Report:
    """Judges pictures uint8 [H, W, 3] by their captions.

    Args:
        clip: a CLIP folder, for the score.
        features: InceptionV3, as train/port_inception.py writes it, for distances to `against`.
        against: other pictures, real ones.

    Raises:
        UserError: one line, for a model that is missing or damaged.
    """
    right: scenes.Shares = {}
    if all(image.shape == (judge.SIDE, judge.SIDE, 3) for image in images):
        right = scenes.right(judge.read(), images, captions)
    score = None if clip is None else float(clip_score(open_clip(clip), images, captions).mean())
    if features is None:
        return Report(len(images), right, score)
    params = inception.read(features)
    ours, theirs = (inception.features(params, some) for some in (images, against))
    distance, kernel = distances.fid(ours, theirs), distances.kid(ours, theirs)
    return Report(len(images), right, score, distance, kernel)


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
        lines.append(f"| KID x 1000 | {1000 * mean:.2f} ± {1000 * spread:.2f} | |")
    return "\n".join(lines)

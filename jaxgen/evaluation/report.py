"""What `jaxgen evaluate` says of pictures, as data and as a table."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from jaxgen.data.examples import BadExample, Source
from jaxgen.data.folder import METADATA, Folder
from jaxgen.data.sources import open_source
from jaxgen.evaluation import distances, inception, judge, scenes
from jaxgen.evaluation.clip import (
    Clip,
    embed_images,
    embed_texts,
    for_kid,
    open_clip,
    score_of,
)
from jaxgen.types import Params, UserError

SAMPLES = "samples.jsonl"  # the list that `jaxgen sample` writes
SETTINGS = ("model", "sampler", "steps", "guidance", "seed", "negative", "size")  # of its lines
MOST = 4 << 30  # bytes of pictures that are held in memory at once

Distance = tuple[float, float]  # and its standard error


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
        kid: kernel distance of the same, and its standard error by the bootstrap.
        kid_in_clip: the same of a CLIP's image features, which need no InceptionV3.
    """

    pictures: int
    judged: int
    right: dict[str, tuple[int, int]] = field(default_factory=dict)
    clip_score: float | None = None
    fid: float | None = None
    kid: Distance | None = None
    kid_in_clip: Distance | None = None


def open_pictures(ref: str) -> Source:
    """A folder that `jaxgen sample` filled, or any source of training data."""
    return Folder(Path(ref), listing=SAMPLES) if _is_sampled(ref) else open_source(ref)


def made_with(ref: str, count: int) -> dict[str, list[Any]]:
    """How the first pictures of a folder of `jaxgen sample` were made, each value once.

    Nothing for other sources. The folder is one that `open_pictures` has read.
    """
    if not _is_sampled(ref):
        return {}
    written = (Path(ref) / SAMPLES).read_text("utf-8-sig").split("\n")
    lines = [json.loads(line) for line in written if line.strip()][:count]
    values = {
        name: dict.fromkeys(json.dumps(line[name]) for line in lines if name in line)
        for name in SETTINGS
    }
    return {name: [json.loads(value) for value in some] for name, some in values.items() if some}


def _is_sampled(ref: str) -> bool:
    return (Path(ref) / SAMPLES).is_file() and not (Path(ref) / METADATA).is_file()


def counted(source: Source, count: int | None) -> int:
    """How many pictures of a source are asked for. UserError for more than there are, and none."""
    count = len(source) if count is None else count
    if not 0 < count <= len(source):
        raise UserError(f"count {count} is not from 1 to {len(source)}, which {source.ref} has")
    return count


def read_all(
    source: Source, count: int | None, last: bool = False, progress: bool = False
) -> tuple[list[np.ndarray], list[str]]:
    """The first pictures of a source, or its last, all without a count; and their captions.

    Raises:
        UserError: for more than there are or fit in memory, and for a bad one, by name.
    """
    count = counted(source, count)
    first = len(source) - count if last else 0
    images, captions, room = [], [], MOST
    for i in tqdm(range(count), f"reading {source.ref}", leave=False, disable=not progress):
        try:
            example = source.read(first + i)
        except BadExample as error:
            raise UserError(str(error)) from None
        if "image" not in example:
            raise UserError(f"{source.ref} holds latents, not pictures")
        images.append(example["image"])
        captions.append(example["caption"])
        room -= images[-1].nbytes
        if room < 0:
            raise UserError(f"{source.ref}: {i} pictures fill the memory: name a count up to {i}")
    return images, captions


def evaluate(
    judges: Judges,
    images: Sequence[np.ndarray],
    captions: Sequence[str],
    against: Sequence[np.ndarray] = (),
    progress: bool = False,
) -> Report:
    """Judges pictures uint8 [H, W, 3] by their captions, and all of them against other pictures."""
    fit = [i for i, image in enumerate(images) if image.shape == (judge.SIDE, judge.SIDE, 3)]
    right: scenes.Shares = {}
    if fit:
        shown, said = [images[i] for i in fit], [captions[i] for i in fit]
        right = scenes.right(judges.judge, shown, said, progress)
    score = distance = kernel = in_clip = None
    if judges.clip is not None:
        seen = embed_images(judges.clip, images, progress)
        score = float(score_of(seen, embed_texts(judges.clip, captions)).mean())
        if len(against):
            real = embed_images(judges.clip, against, progress)
            in_clip = distances.kid(for_kid(seen), for_kid(real))
    if judges.inception is not None and len(against):
        ours, theirs = (
            inception.features(judges.inception, some, progress) for some in (images, against)
        )
        distance, kernel = distances.fid(ours, theirs), distances.kid(ours, theirs)
    return Report(len(images), len(fit), right, score, distance, kernel, in_clip)


def table(columns: Mapping[str, Report]) -> str:
    """The figures of one or more sets of pictures as a table in Markdown, a column each.

    How often something was asked stands once, and in the cell of a set where it differs. What
    stands behind ± is a standard error.
    """
    reports = list(columns.values())
    lines = [f"| | asked | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    lines.append(_row("pictures", "", [str(each.pictures) for each in reports]))
    for name in sorted({name for each in reports for name in each.right}, key=scenes.order):
        counted = [each.right.get(name, (0, 0)) for each in reports]
        first = counted[0][1]
        cells = [
            f"{right / asked:.1%}" + f" of {asked}" * (asked != first) if asked else ""
            for right, asked in counted
        ]
        lines.append(_row(name, str(first), cells))
    for title, cells in {
        "CLIP score": [_shown(each.clip_score) for each in reports],
        "FID": [_shown(each.fid) for each in reports],
        "KID x 1000": [_with_error(each.kid) for each in reports],
        "KID x 1000 in CLIP features": [_with_error(each.kid_in_clip) for each in reports],
    }.items():
        if any(cells):
            lines.append(_row(title, "", cells))
    unfit = sum(each.pictures - each.judged for each in reports)
    if unfit:
        lines.append(f"\n{unfit} are not of 64x64, and were not judged.")
    return "\n".join(lines)


def _row(title: str, asked: str, cells: Sequence[str]) -> str:
    return f"| {title} | {asked} | {' | '.join(cells)} |"


def _shown(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.2f}"


def _with_error(distance: Distance | None) -> str:
    return "" if distance is None else f"{1000 * distance[0]:.2f} ± {1000 * distance[1]:.2f}"

"""Whether samples are copies: the nearest of all training scenes to each, at pixel level.

    python benchmarks/quality.py --splits test --out quality
    python benchmarks/memorised.py quality/test

The same is asked of the real scenes of the test split whose captions were the prompts, and which
cannot be copies: what is as far from the training scenes as they are is no copy either. All 100,000
training scenes are drawn and compared; a distance is the root mean square over pixels and channels,
in levels of 255. Writes a picture of the nearest pairs of both. Two minutes on two cores. Prints
Markdown.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from jaxgen.data import images
from jaxgen.data.emoji_scenes.backgrounds import SIDE
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import report
from jaxgen.types import UserError

AT_ONCE = 1000  # training scenes
PAIRS = 8  # that are shown


@dataclass(frozen=True)
class Bench:
    """What to measure."""

    samples: tyro.conf.Positional[str]
    """A folder that `jaxgen sample` filled."""
    count: int = 200
    """How many of its pictures, the first ones."""
    scenes: int = 100_000
    """How many training scenes, the first ones."""
    pairs: Path = Path("nearest.png")
    """The eight nearest samples, the training scenes that each is nearest to, and the same of test
    scenes: four rows."""


@jax.jit
def squares(a: jax.Array, b: jax.Array) -> jax.Array:
    """Squared distances of rows [N, D] and [M, D] -> [N, M]."""
    product = jnp.matmul(a, b.T, precision="highest")
    return jnp.square(a).sum(-1)[:, None] - 2 * product + jnp.square(b).sum(-1)


def nearest(pictures: np.ndarray, train: EmojiScenes, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each picture [N, 64, 64, 3]: the distance to its nearest training scene, and which."""
    rows = lambda images: jnp.asarray(images, jnp.float32).reshape(len(images), -1) - 127.5  # noqa: E731
    ours, best = rows(pictures), np.full(len(pictures), np.inf)
    which = np.zeros(len(pictures), np.int64)
    with ThreadPoolExecutor(2) as pool:
        for start in tqdm(range(0, count, AT_ONCE), unit="thousand"):
            stop = min(start + AT_ONCE, count)
            images = np.stack([*pool.map(lambda i: train.read(i)["image"], range(start, stop))])
            found = np.asarray(squares(ours, rows(images)))
            at = found.argmin(1)
            closer = found.min(1) < best
            which[closer], best[closer] = start + at[closer], found.min(1)[closer]
    # Once more and exactly: differences of large sums round to a tenth of a level.
    own = np.stack([train.read(int(i))["image"] for i in which])
    return np.sqrt(np.square(pictures.astype(np.float64) - own).mean((1, 2, 3))), which


def both(bench: Bench) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Samples, and the real test scenes whose captions were their prompts."""
    made, prompts = report.read_all(report.open_pictures(bench.samples), bench.count)
    real, captions = report.read_all(EmojiScenes("emoji_scenes:test"), bench.count)
    for i, (prompt, caption) in enumerate(zip(prompts, captions)):
        if prompt != caption:
            raise UserError(
                f"{bench.samples}: prompt {i} is {prompt[:60]!r}, and test scene {i} is of "
                f"{caption[:60]!r}; were they sampled by quality.py?"
            )
    return made, real


def sized(picture: np.ndarray) -> np.ndarray:
    """UserError for pictures of another size than scenes."""
    if picture.shape != (SIDE, SIDE, 3):
        raise UserError(f"samples are {picture.shape[1]}x{picture.shape[0]}; scenes are 64x64")
    return picture


def table(ours: np.ndarray, theirs: np.ndarray) -> str:
    """Distances of samples and of test scenes, in Markdown."""
    lines = ["| distance to the nearest training scene | least | 5 % | median | 95 % |"]
    lines.append("|---|---|---|---|---|")
    for name, some in (("samples", ours), ("test scenes", theirs)):
        shown = " | ".join(f"{q:.1f}" for q in np.percentile(some, (0, 5, 50, 95)))
        lines.append(f"| {name} | {shown} |")
    closer = (ours < theirs.min()).mean()
    lines.append(f"\nsamples nearer to a training scene than every test scene is: {closer:.1%}")
    return "\n".join(lines)


def main(bench: Bench) -> None:
    if bench.count < PAIRS:
        raise UserError(f"count {bench.count} is not from {PAIRS}, the pairs that are shown")
    train = EmojiScenes("emoji_scenes")
    if not 0 < bench.scenes <= len(train):
        raise UserError(f"scenes {bench.scenes} is not from 1 to {len(train)}")
    if bench.pairs.suffix != ".png" or not bench.pairs.absolute().parent.is_dir():
        raise UserError(f"--pairs {bench.pairs} is no .png in a folder that is there")
    pictures = np.stack([sized(picture) for some in both(bench) for picture in some])
    distances, which = nearest(pictures, train, bench.scenes)
    print(f"{bench.count} samples, {bench.count} test scenes, {bench.scenes} training scenes\n")
    ours, theirs = distances[: bench.count], distances[bench.count :]
    print(table(ours, theirs))
    rows: list[list[np.ndarray]] = []
    for first, some in ((0, ours), (bench.count, theirs)):
        order = some.argsort()[:PAIRS]
        rows.append([pictures[first + i] for i in order])
        rows.append([train.read(int(which[first + i]))["image"] for i in order])
    Image.fromarray(images.rows(rows)).save(bench.pairs)


if __name__ == "__main__":
    try:
        main(tyro.cli(Bench, description=__doc__))
    except UserError as error:
        print(f"memorised: {error}", file=sys.stderr)
        sys.exit(2)

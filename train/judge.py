"""Trains the judge of emoji_scenes (jaxgen/evaluation/judge.py) from nothing, on real scenes alone.

    python train/judge.py --out jaxgen/assets/judge

Scenes of seeds that nothing else uses, rare and held subjects as often as the others. Half of them
are blurred or noisy, as what an autoencoder makes may be. Some 15 to 20 minutes of two CPU cores.
Weights that are there are replaced in the end, and the card beside them stays.
"""

import itertools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from PIL import Image
from tqdm import tqdm

from jaxgen.data.emoji_scenes import artwork, backgrounds
from jaxgen.data.emoji_scenes.scenes import EmojiScenes
from jaxgen.evaluation import judge
from jaxgen.parts import released
from jaxgen.types import Array, Params, UserError
from jaxgen.weights import files

SPLITS = (*("validation_even",) * 5, "held")  # in turn: 150 subjects, and 30
SCENES = 1000  # of each seed
FIRST_SEED = 1000
VARIES = ("boxes", "subject")  # in number, from scene to scene

Crop = tuple[np.ndarray, int, int]  # of a box; 1 + the number of its subject, or 0; the style's
Loss = Callable[[Params, dict], tuple[Array, dict[str, Array]]]


@dataclass(frozen=True)
class Options:
    """What to train."""

    out: Path
    """A folder for the weights."""
    steps: int = 800
    """Of the finder; the namer takes three times as many, of twice as many examples."""
    batch: int = 32
    """Scenes at a time."""
    learning_rate: float = 2e-3


def spoiled(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """The picture, or one that is blurred or noisy."""
    if rng.random() < 0.5:
        return image
    side = int(rng.integers(32, 65))
    small = Image.fromarray(image).resize((side, side), Image.Resampling.BICUBIC)
    back = np.asarray(small.resize((64, 64), Image.Resampling.BICUBIC), np.float32)
    noisy = back + rng.uniform(0, 16) * rng.standard_normal(back.shape, np.float32)
    return noisy.round().clip(0, 255).astype(np.uint8)


def scene_of(number: int) -> tuple[str, int, int]:
    """Split, seed and place there of a training scene; no two numbers have the same."""
    turn, way = divmod(number, len(SPLITS))
    more, i = divmod(turn, SCENES)
    return SPLITS[way], FIRST_SEED + more * len(SPLITS) + way, i


@lru_cache(maxsize=2 * len(SPLITS))
def source(split: str, seed: int) -> EmojiScenes:
    """Scenes with a map of their subjects."""
    return EmojiScenes(f"emoji_scenes:{split}", columns=("segmentation",), seed=seed)


def example(number: int) -> dict[str, np.ndarray]:
    """A training scene, and what is to be found in it."""
    split, seed, i = scene_of(number)
    scene = source(split, seed).read(i)
    segmentation = scene["segmentation"]
    cells = segmentation[1::2, 1::2]  # the lower right pixel stands for its cell
    middle = (np.arange(judge.CELLS) + 0.5) / judge.CELLS
    x, y = np.meshgrid(middle, middle)
    reach = np.zeros((*cells.shape, 4), np.float32)
    for subject, box in zip(scene["subject"], scene["boxes"]):
        own = cells == subject + 1
        edges = np.stack([x - box[0], y - box[1], box[2] - x, box[3] - y], -1)
        reach[own] = edges[own]
    return {
        "image": spoiled(scene["image"], np.random.default_rng(number)),
        "shown": cells > 0,
        "reach": reach.clip(0.01),
        "style": np.int32(artwork.STYLES.index(scene["style"])),
        "colour": np.int32(list(backgrounds.COLOURS).index(scene["colour"])),
        "boxes": scene["boxes"],
        "subject": scene["subject"],
    }


def crops(scene: dict[str, np.ndarray], rng: np.random.Generator) -> list[Crop]:
    """Its subjects as a finder would cut them out, a little off; and a box that shows none."""
    found, style = [], int(scene["style"])
    for subject, box in zip(scene["subject"], scene["boxes"]):
        size = np.tile(box[2:] - box[:2], 2)
        off = box + 0.05 * size * rng.standard_normal(4)
        found.append((judge.crop(scene["image"], _within(off)), int(subject) + 1, style))
    corner, size = rng.uniform(0, 0.7, 2), rng.uniform(0.25, 0.7, 2)
    none = np.concatenate([corner, np.minimum(corner + size, 1)])
    boxes = np.concatenate([scene["boxes"], none[None]])
    if judge.overlaps(boxes)[-1, :-1].max() < 0.3:
        found.append((judge.crop(scene["image"], _within(none)), 0, style))
    return found


def _within(box: np.ndarray) -> tuple[float, float, float, float]:
    x0, y0, x1, y1 = box.clip(0, 1).tolist()
    return x0, y0, max(x1, x0 + 0.05), max(y1, y0 + 0.05)


def scenes(batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches for the finder, without end; no scene comes twice."""
    for start in itertools.count(0, batch):
        rows = [example(number) for number in range(start, start + batch)]
        yield {n: np.stack([row[n] for row in rows]) for n in rows[0] if n not in VARIES}


def boxes(batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches for the namer, without end."""
    held: list[Crop] = []
    for number in itertools.count():
        held += crops(example(number), np.random.default_rng([number, 1]))
        if len(held) >= 4 * batch:  # of many scenes, mixed
            np.random.default_rng([number, 2]).shuffle(held)
            rows, held = held[:batch], held[batch:]
            images, subjects, styles = map(np.stack, zip(*rows))
            yield {"image": images, "subject": subjects, "style": styles}


def finding(params: Params, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Cross entropies, and how far the logarithms of boxes are off where there is a subject."""
    shown, reach, colour = judge.Finder().apply({"params": params}, batch["image"])
    mask = batch["shown"]
    off = jnp.abs(jnp.log(reach + 0.01) - jnp.log(batch["reach"] + 0.01)).mean(-1)
    box = jnp.where(mask, off, 0).sum() / mask.sum()
    cells = optax.sigmoid_binary_cross_entropy(shown, mask).mean()
    back = optax.softmax_cross_entropy_with_integer_labels(colour, batch["colour"]).mean()
    right = {"cells": ((shown > 0) == mask).mean(), "off": box}
    right["colour"] = (colour.argmax(-1) == batch["colour"]).mean()
    return 2 * cells + box + 0.5 * back, right


def naming(params: Params, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """The cross entropies of what a box shows, and of its style where it shows something."""
    name, style = judge.namer().apply({"params": params}, batch["image"])
    loss = optax.softmax_cross_entropy_with_integer_labels(name, batch["subject"]).mean()
    something = batch["subject"] > 0
    styled = optax.softmax_cross_entropy_with_integer_labels(style, batch["style"])
    loss += 0.5 * jnp.where(something, styled, 0).sum() / something.sum()
    right = {"subject": name.argmax(-1) == batch["subject"]}
    right["style"] = (style.argmax(-1) == batch["style"]) | ~something
    return loss, {key: values.mean() for key, values in right.items()}


def learn(loss: Loss, params: Params, batches: Iterator[dict], steps: int, rate: float) -> Params:
    """AdamW, one cosine long; batches are made beside the steps."""
    schedule = optax.warmup_cosine_decay_schedule(0, rate, min(100, steps // 2), steps, rate / 100)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=1e-2)
    )
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState, batch: dict[str, Array]) -> tuple:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, metrics | {"loss": value}

    shown: dict[str, float] = {}
    with ThreadPoolExecutor(1) as pool, tqdm(total=steps, unit="step") as bar:
        ahead = pool.submit(next, batches)
        for _ in range(steps):
            batch, ahead = ahead.result(), pool.submit(next, batches)
            params, state, metrics = step(params, state, batch)
            for name, value in metrics.items():
                shown[name] = 0.95 * shown.get(name, float(value)) + 0.05 * float(value)
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
            bar.update()
    return params


def main(options: Options) -> None:
    check_place(options.out)
    params = judge.init(jax.random.key(0))
    found = learn(
        finding, params["finder"], scenes(options.batch), options.steps, options.learning_rate
    )
    named = learn(
        naming, params["namer"], boxes(2 * options.batch), 3 * options.steps, options.learning_rate
    )
    write({"finder": found, "namer": named}, options.out)


def check_place(folder: Path) -> None:
    """Makes the folder; UserError, before an hour of work, where one may not write."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write {folder}: one may not write there")


def write(params: Params, folder: Path) -> None:
    """float16; read once as a whole before it takes the place of what is there."""
    halves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".unfinished-") as scratch:
        files.save_folder(Path(scratch), judge.STEM, released(halves))
        judge.read(Path(scratch))
        for path in Path(scratch).iterdir():  # one file, as it is small
            (folder / f"{path.name}{files.SUM}").unlink(missing_ok=True)  # of what was there
            path.replace(folder / path.name)
    files.write_sum(folder / f"{judge.STEM}.safetensors")


if __name__ == "__main__":
    try:
        main(tyro.cli(Options, description=__doc__))
    except UserError as error:
        print(f"judge: {error}", file=sys.stderr)
        sys.exit(2)

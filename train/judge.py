"""Trains the judge of emoji_scenes (jaxgen/evaluation/judge.py) from nothing, on real scenes alone.

    python train/judge.py --out jaxgen/assets/judge

Scenes of seeds that nothing else uses, rare and held subjects as often as the others. Half of them
are blurred or noisy, as what an autoencoder makes may be. Some 15 minutes of two CPU cores.
"""

import shutil
from collections.abc import Iterator
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
from jaxgen.save import check_new, released
from jaxgen.types import Array, Params
from jaxgen.weights import files

SPLITS = (*("validation_even",) * 5, "held")  # in turn: 150 subjects, and 30
SCENES = 1000  # of each seed
FIRST_SEED = 1000


@dataclass(frozen=True)
class Options:
    """What to train."""

    out: Path
    """A new or empty folder."""
    steps: int = 1100
    batch: int = 32
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


def examples(batch: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches without end; no scene comes twice."""
    styles, colours = list(artwork.STYLES), list(backgrounds.COLOURS)

    @lru_cache(maxsize=2 * len(SPLITS))
    def source(split: str, seed: int) -> EmojiScenes:
        return EmojiScenes(f"emoji_scenes:{split}", columns=("segmentation",), seed=seed)

    def make(number: int) -> dict[str, np.ndarray]:
        split, seed, i = scene_of(number)
        scene = source(split, seed).read(i)
        return {
            "image": spoiled(scene["image"], np.random.default_rng(number)),
            "cells": scene["segmentation"][1::2, 1::2].astype(np.int32),
            "style": np.int32(styles.index(scene["style"])),
            "colour": np.int32(colours.index(scene["colour"])),
        }

    for start in range(0, 1 << 40, batch):
        rows = [make(number) for number in range(start, start + batch)]
        yield {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def loss(params: Params, batch: dict[str, Array]) -> tuple[Array, dict[str, Array]]:
    """Cross entropies of the cells, most of which are background, of style and of colour."""
    found = judge.network().apply({"params": params}, batch["image"])
    losses, right = {}, {}
    for name, logits in zip(("cells", "style", "colour"), found):
        wrong = optax.softmax_cross_entropy_with_integer_labels(logits, batch[name])
        weight = jnp.where(batch["cells"] > 0, 2.0, 1.0) if name == "cells" else 1.0
        losses[name] = (weight * wrong).mean()
        right[name] = logits.argmax(-1) == batch[name]
    shown = batch["cells"] > 0
    subject = (right["cells"] & shown).sum() / shown.sum()
    metrics = {"subject": subject, "style": right["style"].mean(), "colour": right["colour"].mean()}
    return losses["cells"] + 0.3 * (losses["style"] + losses["colour"]), metrics


def main(options: Options) -> None:
    check_new(options.out)
    rate = optax.warmup_cosine_decay_schedule(
        0,
        options.learning_rate,
        min(100, options.steps // 2),
        options.steps,
        options.learning_rate / 100,
    )
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(rate, weight_decay=1e-2))
    params = judge.init(jax.random.key(0))
    state = optimizer.init(params)

    @jax.jit
    def step(params: Params, state: optax.OptState, batch: dict[str, Array]) -> tuple:
        (value, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, metrics | {"loss": value}

    shown: dict[str, float] = {}
    batches = examples(options.batch)
    with ThreadPoolExecutor(1) as pool, tqdm(total=options.steps, unit="step") as bar:
        ahead = pool.submit(next, batches)
        for _ in range(options.steps):
            batch, ahead = ahead.result(), pool.submit(next, batches)
            params, state, metrics = step(params, state, batch)
            for name, value in metrics.items():
                shown[name] = 0.95 * shown.get(name, float(value)) + 0.05 * float(value)
            bar.set_postfix({name: f"{value:.3f}" for name, value in shown.items()}, refresh=False)
            bar.update()
    write(params, options.out)


def write(params: Params, folder: Path) -> None:
    """float16, all or nothing."""
    scratch = folder.with_name(f".{folder.name}-unfinished")
    shutil.rmtree(scratch, ignore_errors=True)
    halves = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), params)
    files.save_folder(scratch, judge.STEM, released(halves))
    scratch.rename(folder)


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))

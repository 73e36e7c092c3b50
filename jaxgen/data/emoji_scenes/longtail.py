"""Which subjects the scenes of emoji_scenes show: a long tail, by a law and not by luck.

In the 100,000 scenes of `train`, the subject of rank r, which is its number, occurs exactly
`law(r)` times, whatever the seed: 60 head subjects 4500 to 1200 times, 60 middle ones down to 25,
30 tail ones 20 to 5. The 30 held subjects are in the split `held` alone.
"""

from functools import lru_cache
from typing import NamedTuple

import numpy as np

from jaxgen.data.emoji_scenes import artwork

MOST = 3  # subjects in a scene
PER_SCENE = 1.7  # on average, where the law does not say it


class Split(NamedTuple):
    """Scenes that no other split has, and the groups of subjects that they show."""

    number: int  # never to change: the key of every scene holds it
    scenes: int
    groups: tuple[str, ...]
    even: bool  # all subjects are as frequent; otherwise by the law


TRAINED = ("head", "middle", "tail")
SPLITS = {
    "train": Split(0, 100_000, TRAINED, False),
    "validation": Split(1, 2_000, TRAINED, False),
    "test": Split(2, 10_000, TRAINED, False),
    "validation_even": Split(3, 2_000, TRAINED, True),
    "test_even": Split(4, 10_000, TRAINED, True),
    "held": Split(5, 3_000, ("held",), True),
    "train_even": Split(6, 100_000, TRAINED, True),
}


def law(ranks: np.ndarray) -> np.ndarray:
    """How often subjects occur in `train`, by rank: straight lines in the logarithm."""
    knots = np.log([4500, 1200, 25, 20, 5])
    return np.rint(np.exp(np.interp(ranks, [0, 59, 119, 120, 149], knots))).astype(np.int64)


def subjects(split: str, seed: int, i: int) -> tuple[int, ...]:
    """The numbers of the subjects of a scene: one to three, none of them twice."""
    return tuple(n for n in _table(split, seed)[i].tolist() if n >= 0)


def counts(split: str = "train", seed: int = 0) -> np.ndarray:
    """In how many scenes of a split each subject is, int64 [subjects]; nothing is drawn."""
    table = _table(split, seed)
    return np.bincount(table[table >= 0], minlength=len(artwork.load().subjects))


@lru_cache(maxsize=8)
def _table(split: str, seed: int) -> np.ndarray:
    """The subjects of all scenes of a split, int16 [scenes, 3], -1 where there are fewer.

    Every subject is written down as often as it is to occur; the slips are shuffled and dealt to
    the scenes, and where a scene gets two alike, one is exchanged with another scene's.
    """
    number, scenes, _, _ = SPLITS[split]
    rng = np.random.Generator(np.random.Philox(key=[seed, number << 48 | 2 << 40]))
    slips = rng.permutation(_slips(split, rng))
    triples = (len(slips) - scenes) // 4
    pairs = len(slips) - scenes - 2 * triples
    held = np.ones(scenes, np.int64)
    held[: triples + pairs] = 2
    held[:triples] = 3
    places = np.arange(MOST) < rng.permutation(held)[:, None]
    table = np.full((scenes, MOST), -1, np.int16)
    table[places] = slips
    rows, columns = np.nonzero(places)

    while len(twice := _twice(table)):
        for row, column in twice:
            other = rng.integers(len(rows))
            there = rows[other], columns[other]
            table[row, column], table[there] = table[there], table[row, column]
    return table


def _slips(split: str, rng: np.random.Generator) -> np.ndarray:
    """Every subject, as often as it occurs in a split; a part of the law is rounded at random."""
    _, scenes, groups, even = SPLITS[split]
    numbers = artwork.load().group(*groups)
    expected = law(np.arange(len(numbers))) * (scenes / SPLITS["train"].scenes)
    if even:
        expected = np.full(len(numbers), PER_SCENE * scenes / len(numbers))
    steps = np.floor(np.cumsum(expected) + (0.5 if split == "train" else rng.random()))
    return np.repeat(numbers, np.diff(steps, prepend=0).astype(np.int64))


def _twice(table: np.ndarray) -> np.ndarray:
    """Places [K, 2] whose subject is in an earlier place of the same scene."""
    first, second, third = table.T
    again = np.stack([second == first, (third == first) | (third == second)], axis=1)
    again &= table[:, 1:] >= 0
    return np.add(np.argwhere(again), (0, 1))

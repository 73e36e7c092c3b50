"""Buckets: batches of several shapes, so that little of a picture is cropped away."""

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from tqdm import tqdm

from jaxgen.data.examples import BadExample, Source, patiently
from jaxgen.data.order import Draw, Size, shuffled, turns
from jaxgen.types import UserError

CHUNK = 256  # pictures whose sizes a thread reads at a time


def bucket_sizes(area_side: int, step: int = 64, most_aspect: float = 2.0) -> tuple[Size, ...]:
    """The sizes that pictures of all shapes are trained at, from upright to wide.

    Each has sides divisible by `step`, at most as many pixels as a square of `area_side`, and as
    many of them as its width allows; width over height is at most `most_aspect`, either way.
    """
    sizes = set()
    for short in range(step, area_side + 1, step):
        long = area_side**2 // short // step * step
        if long <= most_aspect * short:
            sizes |= {(short, long), (long, short)}
    return tuple(sorted(sizes))


def nearest_bucket(size: Size, buckets: Iterable[Size]) -> Size:
    """The bucket whose shape is closest, as a ratio: the least of the picture is cropped away."""
    shape = math.log(size[0] / size[1])
    return min(buckets, key=lambda b: (abs(math.log(b[0] / b[1]) - shape), b))


def sort_by_shape(
    source: Source, sizes: tuple[Size, ...], least: int, threads: int
) -> tuple[dict[Size, np.ndarray], list[tuple[str, str]]]:
    """The examples of a source by the size to train each at, and the bad ones with reasons."""
    groups: dict[Size, list[int]] = {size: [] for size in sizes}
    bad = []

    def look(chunk: range) -> list[Size | BadExample]:
        found: list[Size | BadExample] = []
        for i in chunk:
            try:
                found.append(patiently(source.size, i))
            except BadExample as error:
                found.append(error)
        return found

    chunks = [range(i, min(i + CHUNK, len(source))) for i in range(0, len(source), CHUNK)]
    with ThreadPoolExecutor(max(1, threads)) as pool:
        looked = tqdm(pool.map(look, chunks), f"shapes of {source.ref}", len(chunks), leave=False)
        for i, found in enumerate(found for chunk in looked for found in chunk):
            if isinstance(found, BadExample):
                bad.append((found.name, found.reason))
            elif min(found) < least:
                reason = f"{found[0]}x{found[1]} is below least_side {least}"
                bad.append((source.name(i), reason))
            else:
                groups[nearest_bucket(found, sizes)].append(i)
    return {size: np.array(indices, np.int64) for size, indices in groups.items()}, bad


class Bucketed:
    """Batches of one size each, from pictures of about that shape.

    In each epoch of a source every bucket is permuted and cut into whole global batches, and the
    batches are shuffled. What is left over waits for another epoch. A bucket that never fills a
    batch joins the nearest one that does.

    Args:
        buckets: for each source, the sizes and which examples are trained at each.
        weights: shares of the sources in the batches.
        shuffle, batch_size, seed: as for `Plain`; a batch is global.

    Raises:
        UserError: for a source none of whose buckets fills a batch.
    """

    def __init__(
        self,
        buckets: Sequence[dict[Size, np.ndarray]],
        weights: Sequence[float],
        batch_size: int,
        seed: int,
        shuffle: bool,
    ):
        self._turns = turns(weights)
        self._batch_size, self._shuffle = batch_size, shuffle
        self._sources = []
        for s, groups in enumerate(buckets):
            full = _merge(groups, batch_size)
            ends = np.cumsum([len(g) // batch_size for g in full.values()])
            batches = shuffled(int(ends[-1]), shuffle, seed, s)
            inner = [shuffled(len(g), shuffle, seed, s, 1 + b) for b, g in enumerate(full.values())]
            self._sources.append((list(full.items()), ends, batches, inner))

    def draws(self, n: int, rows: Sequence[int]) -> list[Draw]:
        """What stands in these rows of global batch n; all are of one size."""
        source, turn = self._turns(n)
        sizes, ends, batches, inner = self._sources[source]
        batch, epoch = batches[turn], turn // int(ends[-1])
        b = int(np.searchsorted(ends, batch, side="right"))
        size, group = sizes[b]
        first = (batch - (int(ends[b - 1]) if b else 0)) * self._batch_size
        # Unshuffled, an epoch goes on where the last one ended: else the same ones were left over.
        length = len(group) if self._shuffle else len(group) // self._batch_size * self._batch_size
        places = [inner[b][epoch * length + first + row] for row in rows]
        return [Draw(source, group, at, size) for at in places]


def _merge(groups: dict[Size, np.ndarray], batch_size: int) -> dict[Size, np.ndarray]:
    """The buckets that fill a batch, each with the examples of smaller ones nearest to it."""
    full = {size: [group] for size, group in sorted(groups.items()) if len(group) >= batch_size}
    if not full:
        most = max(map(len, groups.values()), default=0)
        raise UserError(
            f"no bucket fills a batch of {batch_size}: the largest has {most} pictures; "
            "lower batch_size, or set buckets to False"
        )
    for size, group in sorted(groups.items()):
        if len(group) < batch_size:
            full[nearest_bucket(size, full)].append(group)
    return {size: np.concatenate(parts) for size, parts in full.items()}

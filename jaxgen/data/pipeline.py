"""Batches of training examples, in an order that any process can take up anywhere."""

import logging
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxgen.data import transforms
from jaxgen.data.buckets import Bucketed, bucket_sizes, sort_by_shape
from jaxgen.data.cached import Cached, Description, describe
from jaxgen.data.examples import BadExample, Example, Source
from jaxgen.data.order import Draw, Plain, Size
from jaxgen.data.sources import open_source
from jaxgen.data.workers import check_grain, end, read_ahead
from jaxgen.types import UserError

LEAST_DRAWN = 1000  # the share of bad examples is one of so many at least: two in three are luck
MOST_NAMED = 1000  # bad examples that are named one by one
logger = logging.getLogger(__name__)

Batch = dict[str, np.ndarray]
Finish = Callable[[Example, np.random.Generator], Batch]


@dataclass(frozen=True)
class Images:
    """Where training pictures come from, and what is done to them."""

    source: str | tuple[tuple[str, float], ...] = ""
    """A folder with metadata.jsonl, ArrayRecord files, a cache, tfds:NAME:SPLIT; or several, and
    weights."""
    size: int = 512
    """Width and height to train at; with buckets, the side of a square of as many pixels."""
    crop: Literal["center", "random"] = "center"
    """Which part of a picture stays that is wider or higher than the size."""
    flip: bool = False
    """Mirror every other picture, unless its caption says left or right."""
    caption_dropout: float = 0.1
    """Share of captions that are emptied, so that guidance has something to subtract."""
    caption: str = ""
    """The column of captions; text or caption where it is not named."""
    columns: tuple[str, ...] = ()
    """Further columns that each example must have; pictures among them are read."""
    buckets: bool = False
    """Train at sizes of several shapes, each batch at one, so that less is cropped away."""
    bucket_step: int = 64
    """What the sides of those sizes are divisible by."""
    least_side: int = 0
    """Pictures with a shorter side than this are skipped; 0 is half of the size."""
    bad_share: float = 0.01
    """The run stops where a larger share of the pictures is damaged, missing or too small."""
    shuffle: bool = True
    """Take the pictures in another random order each epoch."""
    workers: int = 0
    """Processes that read, each with its threads; a script that sets it must guard its main."""
    threads: int = 8
    """Threads that read; each prepares one batch at a time."""

    def __post_init__(self) -> None:
        shares = ("caption_dropout", "bad_share")
        positive = ("size", "bucket_step")
        for name in (*shares, *positive, "least_side", "workers", "threads"):
            value = getattr(self, name)
            if value < (name in positive) or (name in shares and not value <= 1):
                raise UserError(f"{name} = {value} is out of its range")
        for ref, weight in self.parts:
            if not 0 < weight < float("inf"):
                raise UserError(f"the weight {weight} of {ref} is not above zero")
        if self.buckets and self.size % self.bucket_step:
            raise UserError(f"size {self.size} is not divisible by bucket_step {self.bucket_step}")

    @property
    def parts(self) -> tuple[tuple[str, float], ...]:
        """The sources and their weights."""
        return (
            ((self.source, 1.0),) if isinstance(self.source, str) else self.source or (("", 1.0),)
        )

    def caches(self) -> dict[str, Description]:
        """The sources that `jaxgen cache` wrote, and what they hold.

        Raises:
            UserError: for one that does not hold what these settings ask for.
        """
        described = {ref: describe(ref) for ref, _ in self.parts}
        found = {ref: held for ref, held in described.items() if held is not None}
        for ref, held in found.items():
            if len(found) < len(described):
                raise UserError(f"{ref} is a cache, and is not mixed with sources of pictures")
            for name, value in held.settings().items():
                if getattr(self, name) != value:
                    raise UserError(
                        f"{ref} was cached with data.{name} = {value!r}, and not "
                        f"{getattr(self, name)!r}: change it, or cache again"
                    )
        return found

    @property
    def least(self) -> int:
        """Pixels that the shorter side of a picture must have."""
        return self.least_side or max(1, self.size // 2)


class Loader(Iterator[Batch]):
    """Endless batches of this process' rows: process p of P gets rows [p b, (p + 1) b) of each.

    An example depends on the seed and on its place in the order alone, never on the numbers of
    processes, workers or threads. `place` in each batch is that place, uint32 [b], modulo 2**32.
    A bad example is replaced by another one of its source, counted, and named in the log.

    Attributes:
        close: ends the threads and processes that read ahead.
        next_batch: the number of the batch that comes next: the whole state, to be stored.
        skipped: bad examples that this process met, and why; the first `MOST_NAMED`.

    Args:
        data: what to read and how.
        finish: makes arrays of an example that is scaled and cropped, with a generator of its own;
            it may raise BadExample. With workers, it must be picklable.
        batch_size: of all processes together.
        start: the first batch, where a run is resumed.

    Raises:
        UserError: for sources that cannot be read, and where too many examples are bad.
    """

    def __init__(
        self,
        data: Images,
        finish: Finish,
        batch_size: int,
        seed: int,
        start: int = 0,
        process: int = 0,
        processes: int = 1,
    ):
        if batch_size < 1 or batch_size % processes:
            raise UserError(f"batch_size {batch_size} does not divide by {processes} processes")
        if not 0 <= seed < 1 << 63:
            raise UserError(f"seed {seed} is not from 0 to 2**63 - 1")
        check_grain()
        data.caches()
        self.next_batch = start
        self.skipped: dict[str, str] = {}
        self._data = data
        self._drawn = self._bad = 0
        self._sources = [open_source(ref, data.caption, data.columns) for ref, _ in data.parts]
        self._seed, self._batch_size = seed, batch_size

        share = batch_size // processes
        rows = range(process * share, (process + 1) * share)
        make = Maker(data, self._sources, self._plan(), finish, batch_size, rows, seed)
        self._reading = [read_ahead(make, start, data.workers, data.threads)]
        self.close = weakref.finalize(self, end, self._reading)  # at the latest at exit

    def _plan(self) -> Plain | Bucketed:
        weights = [weight for _, weight in self._data.parts]
        size, shuffle = self._data.size, self._data.shuffle
        if not self._data.buckets:
            lengths = [len(source) for source in self._sources]
            return Plain(lengths, weights, (size, size), self._batch_size, self._seed, shuffle)
        sizes = bucket_sizes(size, self._data.bucket_step)
        buckets = []
        for source in self._sources:
            groups, bad = sort_by_shape(source, sizes, self._data.least, self._data.threads)
            self._count(len(source), bad)
            buckets.append(groups)
        return Bucketed(buckets, weights, self._batch_size, self._seed, shuffle)

    def __next__(self) -> Batch:
        if not self._reading:
            raise StopIteration
        try:
            made = next(self._reading[0])
            self._count(made["drawn"], made["bad"])
        except Exception:
            self.close()
            raise
        self.next_batch += 1
        if self._data.workers:  # out of the memory shared with them, which is scarce
            return {name: np.array(array) for name, array in made["batch"].items()}
        return made["batch"]

    def _count(self, drawn: int, bad: list[tuple[str, str]]) -> None:
        """Names bad examples in the log, each once; stops the run where they are too many."""
        for name, reason in bad:
            if name not in self.skipped and len(self.skipped) < MOST_NAMED:
                self.skipped[name] = reason
                logger.warning("skipped %s: %s", name, reason)
        self._drawn += drawn
        self._bad += len(bad)
        share = self._data.bad_share
        if self._bad > share * max(self._drawn, LEAST_DRAWN):
            name, reason = next(iter(self.skipped.items()))
            raise UserError(
                f"{self._bad} of {self._drawn} examples are bad, more than bad_share {share:g}; "
                f"the first is {name}: {reason}"
            )

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on: a run resumed with another one sees other examples."""
        names = ("size", "shuffle", "buckets", "bucket_step")
        sources = [
            source.fingerprint() | {"weight": weight}
            for source, (_, weight) in zip(self._sources, self._data.parts)
        ]
        settings = {name: getattr(self._data, name) for name in names}
        return {"seed": self._seed, "batch_size": self._batch_size, "sources": sources} | settings


class Maker:
    """n -> the rows of one process of global batch n, and what was bad on the way to them."""

    def __init__(
        self,
        data: Images,
        sources: list[Source],
        plan: Plain | Bucketed,
        finish: Finish,
        batch_size: int,
        rows: range,
        seed: int,
    ):
        self._data, self._sources, self._plan, self._finish = data, sources, plan, finish
        self._batch_size, self._rows, self._seed = batch_size, rows, seed

    def __call__(self, n: int) -> dict[str, Any]:
        bad: list[tuple[str, str]] = []
        places = [n * self._batch_size + row for row in self._rows]
        draws = self._plan.draws(n, self._rows)
        made = [self._row(draw, place, bad) for draw, place in zip(draws, places)]
        batch = {name: np.stack([arrays[name] for arrays in made]) for name in made[0]}
        batch["place"] = np.array([place % (1 << 32) for place in places], np.uint32)
        return {"batch": batch, "bad": bad, "drawn": len(made) + len(bad)}

    def _row(self, draw: Draw, place: int, bad: list[tuple[str, str]]) -> Batch:
        """The example of a draw, or the first good one in its stead; adds to `bad`."""
        source = self._sources[draw.source]
        tried = draw.candidates()
        for i in tried:
            rng = np.random.Generator(np.random.Philox(key=[self._seed, place]))
            try:
                return self._finish(prepared(self._data, source, i, draw.size, rng), rng)
            except BadExample as error:
                bad.append((error.name or source.name(i), error.reason))
        name, reason = bad[-len(tried)]
        raise UserError(
            f"{source.ref}: {len(tried)} examples in a row are bad; the first is {name}: {reason}"
        )


def prepared(data: Images, source: Source, i: int, size: Size, rng: np.random.Generator) -> Example:
    """Example i of a source, scaled, cropped and varied as the data says; raises BadExample."""
    if isinstance(source, Cached):
        return source.draw(i, data.flip, data.caption_dropout, rng)
    example = source.read(i, max(*size, data.least))
    height, width = example["image"].shape[:2]
    if min(height, width) < data.least:
        raise BadExample(source.name(i), f"{width}x{height} is below least_side {data.least}")
    example = transforms.resize_and_crop(example, size, data.crop == "random", rng, data.columns)
    if data.flip:
        example = transforms.flip(example, rng, data.columns)
    return transforms.drop_caption(example, data.caption_dropout, rng)

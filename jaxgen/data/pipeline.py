"""Batches of training examples, in an order that any process can take up anywhere."""

import itertools
import weakref
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxgen.data import transforms
from jaxgen.data.buckets import Bucketed, bucket_sizes, sort_by_shape
from jaxgen.data.cached import Cached, Description, describe
from jaxgen.data.examples import BadExample, Example, Source, patiently
from jaxgen.data.order import Draw, Plain, Size
from jaxgen.data.sources import open_source
from jaxgen.data.tally import Tally
from jaxgen.data.workers import begun_deaf, check_grain, end, lost, read_ahead
from jaxgen.types import UserError

PIECE = 16  # rows that a thread makes at a time: few, for all threads and workers hold some

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
    """Mirror every other picture and the hint beside it, unless its caption says left or right. Not
    for columns of normals or poses, whose colours tell sides; hints that annotators make of each
    picture stay right."""
    caption_dropout: float | None = None
    """Share of captions that are emptied, so that guidance has something to subtract; None is what
    the task asks for."""
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
    """Threads that read; each prepares some rows of a batch at a time."""

    def __post_init__(self) -> None:
        shares = ("caption_dropout", "bad_share")
        positive = ("size", "bucket_step")
        for name in (*shares, *positive, "least_side", "workers", "threads"):
            value = getattr(self, name)
            if value is None:
                continue
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
        for (one, first), (ref, held) in itertools.pairwise(found.items()):
            for name in ("vae", "text_encoder", "latents", "text"):
                if getattr(first, name) != getattr(held, name):
                    raise UserError(f"{one} and {ref} differ in {name}, and are not mixed")
        return found

    @property
    def least(self) -> int:
        """Pixels that the shorter side of a picture must have."""
        return self.least_side or max(1, self.size // 2)


class Loader(Iterator[Batch]):
    """Endless batches of this process' rows.

    An example depends on the seed and on its place in the order alone, never on the numbers of
    processes, workers or threads. `place` in each batch is that place, uint32 [b], modulo 2**32.
    One batch is ready in advance. A bad example is replaced by another one of its source, counted,
    and named in the log.

    Attributes:
        close: ends the threads and processes that read ahead.
        next_batch: the number of the batch that comes next: the whole state, to be stored.

    Args:
        data: what to read and how.
        finish: makes arrays of an example that is scaled and cropped, with a generator of its own;
            it may raise BadExample. With workers, it must be picklable.
        batch_size: of all processes together.
        start: the first batch, where a run is resumed.
        rows: those of every batch that this process gets, in this order; all where none are named.
        bad: the property as it was before batch `start`; None for a new run.

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
        rows: Sequence[int] | None = None,
        bad: int | None = None,
    ):
        if batch_size < 1:
            raise UserError(f"batch_size {batch_size} is not a whole number from 1")
        if not 0 <= seed < 1 << 63:
            raise UserError(f"seed {seed} is not from 0 to 2**63 - 1")
        check_grain()
        data.caches()
        self.next_batch = start
        self._data, self._tally = data, Tally(data.bad_share)
        self._sources = [open_source(ref, data.caption, data.columns) for ref, _ in data.parts]
        self._held = [source.fingerprint() for source in self._sources]
        self._seed, self._batch_size = seed, batch_size

        mine = list(range(batch_size) if rows is None else rows)
        pieces = [mine[i : i + PIECE] for i in range(0, len(mine), PIECE)]
        self._pieces = len(pieces)
        plan = self._plan()
        # Shapes are looked at again. Of the share, only what this process sees itself decides: data
        # that were mended must not stop the run once more.
        self._before = 0 if bad is None else bad - self._tally.bad
        make = Maker(data, self._sources, plan, finish, batch_size, pieces, seed)
        first = start * self._pieces
        reading = read_ahead(make, first, self._pieces, data.workers, data.threads)
        self._reading, self._begun = [reading], not data.workers
        self.close = weakref.finalize(self, end, self._reading)  # at the latest at exit

    @property
    def bad(self) -> int:
        """How often this process met a bad example in the run, also before it was resumed."""
        return self._before + self._tally.bad

    @property
    def skipped(self) -> dict[str, str]:
        """Bad examples that this process met, and why."""
        return self._tally.named

    def _plan(self) -> Plain | Bucketed:
        weights = [weight for _, weight in self._data.parts]
        size, shuffle = self._data.size, self._data.shuffle
        if not self._data.buckets:
            lengths = [len(source) for source in self._sources]
            return Plain(lengths, weights, (size, size), self._batch_size, self._seed, shuffle)
        sizes = bucket_sizes(size, self._data.bucket_step)
        buckets = []
        for source, held in zip(self._sources, self._held):
            groups, bad = sort_by_shape(source, sizes, self._data.least, self._data.threads)
            self._tally.add(len(source), bad)
            held["shapes"] = 0  # one picture whose header fails today moves all that come after it
            for shape, group in groups.items():
                known = zlib.crc32(repr(shape).encode(), held["shapes"])
                held["shapes"] = zlib.crc32(group.tobytes(), known)
            buckets.append(groups)
        return Bucketed(buckets, weights, self._batch_size, self._seed, shuffle)

    def __next__(self) -> Batch:
        if not self._reading:
            raise StopIteration
        parts = []
        try:
            for _ in range(self._pieces):
                begin = nullcontext() if self._begun else begun_deaf()  # workers, by the first
                with lost(), begin:
                    made = next(self._reading[0])
                self._begun = True
                self._tally.add(made["drawn"], made["bad"])
                parts.append(made["rows"])
        except Exception:
            self.close()
            raise
        self.next_batch += 1
        # Copied out of the memory that is shared with workers, too, which is scarce.
        return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}

    def fingerprint(self) -> dict[str, Any]:
        """What the order depends on: a run resumed with another one sees other examples."""
        names = ("size", "shuffle", "buckets", "bucket_step")
        weights = [weight for _, weight in self._data.parts]
        sources = [held | {"weight": weight} for held, weight in zip(self._held, weights)]
        settings = {name: getattr(self._data, name) for name in names}
        return {"seed": self._seed, "batch_size": self._batch_size, "sources": sources} | settings


class Maker:
    """k -> the rows of the k-th piece of the batches, and what was bad on the way to them."""

    def __init__(
        self,
        data: Images,
        sources: list[Source],
        plan: Plain | Bucketed,
        finish: Finish,
        batch_size: int,
        pieces: list[list[int]],
        seed: int,
    ):
        self._data, self._sources, self._plan, self._finish = data, sources, plan, finish
        self._batch_size, self._pieces, self._seed = batch_size, pieces, seed

    def __call__(self, k: int) -> dict[str, Any]:
        bad: list[tuple[str, str]] = []
        n, piece = divmod(int(k), len(self._pieces))
        places = [n * self._batch_size + row for row in self._pieces[piece]]
        draws = self._plan.draws(n, self._pieces[piece])
        made = [self._row(draw, place, bad) for draw, place in zip(draws, places)]
        rows = {name: np.stack([arrays[name] for arrays in made]) for name in made[0]}
        rows["place"] = np.array([place % (1 << 32) for place in places], np.uint32)
        return {"rows": rows, "bad": bad, "drawn": len(made) + len(bad)}

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
        return source.draw(i, data.flip, data.caption_dropout or 0, rng)
    example = patiently(source.read, i, max(*size, data.least))
    height, width = example["image"].shape[:2]
    if min(height, width) < data.least:
        raise BadExample(source.name(i), f"{width}x{height} is below least_side {data.least}")
    example = transforms.resize_and_crop(example, size, data.crop == "random", rng, data.columns)
    if data.flip:
        example = transforms.flip(example, rng, data.columns)
    return transforms.drop_caption(example, data.caption_dropout or 0, rng)

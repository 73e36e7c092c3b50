"""What training would compute again each epoch, once: latents of pictures, embeddings of captions.

Numbers are stored as float16, which is half of the disk and of what is sent to the devices. It
rounds latents by some 2e-4 of their size, a hundredth of the least noise that training adds to them
(0.03 for Stable Diffusion), and is eight times finer than the bfloat16 that most runs compute in.
An example of which it cannot hold a number is no use to training either, and is skipped.
"""

import dataclasses
import math
from collections.abc import Generator, Iterator
from contextlib import closing
from functools import partial
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgen import config, locks, sharding
from jaxgen.data import transforms
from jaxgen.data.cached import DESCRIPTION, EMPTY, FIXED, LATENTS, MIRRORED, Description
from jaxgen.data.examples import BadExample, Example, Source
from jaxgen.data.pipeline import PIECE, Images, prepared
from jaxgen.data.records import encode, write_records
from jaxgen.data.sources import open_source
from jaxgen.data.tally import Tally
from jaxgen.data.workers import check_grain, end, lost, read_ahead
from jaxgen.denoiser import Model
from jaxgen.load import read_params
from jaxgen.save import check_new
from jaxgen.tasks import base
from jaxgen.training import setup
from jaxgen.training.recipe import Train
from jaxgen.types import Array, Params, UserError

SHARD_BYTES = 4 << 30


def cache(recipe: Train, out: Path, progress: bool = True) -> Path:
    """Writes what the recipe's model makes of its data to a folder, all or nothing.

    Named as the source of the data, the folder trains the same recipe to the same losses: order,
    captions that are dropped and pictures that are mirrored are those of the uncached run, as long
    as no example is bad. Those that are bad are named in the log and left out.

    Args:
        recipe: a run of text to image whose VAE does not learn; where the text encoder does, its
            embeddings are not stored.
        out: a new or empty folder.
        progress: whether a bar is shown.

    Returns:
        The folder.

    Raises:
        UserError: for what cannot be cached, before anything compiles; and where more examples are
            bad than the data's `bad_share`.
    """
    check_grain()
    check_new(out)
    if jax.process_count() > 1:
        raise UserError("a cache is written by one process; start it on one host alone")
    source, data = _source(recipe.data)
    mesh = sharding.training_mesh(*recipe.mesh.sizes)
    encoders = Encoders(recipe, mesh)
    reader = Reader(data, source, recipe.data.flip)

    with locks.whole(out, DESCRIPTION) as scratch:
        description = _write(scratch, reader, encoders, progress)
        config.write_json(scratch / DESCRIPTION, dataclasses.asdict(description))
    return out.resolve()


def _source(wanted: Images) -> tuple[Source, Images]:
    """The one source of the data, and how its pictures are read: in order, none varied."""
    if len(wanted.parts) > 1:
        raise UserError("data.source names several sources: cache each to a folder of its own")
    for name, value in FIXED.items():
        if getattr(wanted, name) != value:
            raise UserError(
                f"data.{name} = {getattr(wanted, name)!r}: a cache holds the centre of each "
                f"picture, at one size, and its caption; set it to {value!r}"
            )
    if wanted.caches():
        raise UserError(f"{wanted.source} is a cache already; name the pictures in data.source")
    ((ref, _),) = wanted.parts
    plain = dataclasses.replace(wanted, flip=False, caption_dropout=0.0)
    return open_source(ref, wanted.caption), plain


@dataclasses.dataclass(frozen=True)
class Reader:
    """k -> the good ones of the k-th few examples of a source, and the bad ones with reasons.

    Each example has its `index`, its pixels as `image`, its `caption`, and whether it `mirrors`.
    """

    data: Images
    source: Source
    flip: bool  # whether any mirrors

    @property
    def pieces(self) -> int:
        """Of all examples; the last one may not be full."""
        return -(-len(self.source) // PIECE)

    def __call__(self, k: int) -> dict[str, Any]:
        good, bad = [], []
        for i in range(k * PIECE, min((k + 1) * PIECE, len(self.source))):
            try:
                good.append(self._read(i))
            except BadExample as error:
                bad.append((error.name or self.source.name(i), error.reason))
        return {"good": good, "bad": bad}

    def _read(self, i: int) -> Example:
        size, rng = self.data.size, np.random.default_rng(0)  # nothing is drawn from it
        example = prepared(self.data, self.source, i, (size, size), rng)
        kept = {"image": example["image"], "caption": example["caption"]}
        return {"index": i, "mirrors": self.flip and transforms.may_flip(example)} | kept


class Encoders:
    """The recipe's VAE and, unless it learns, its text encoder, on the recipe's mesh."""

    def __init__(self, recipe: Train, mesh: Mesh) -> None:
        task, tensors = setup.open_task(recipe)
        learned = base.learned(task, tensors)
        if not task.cached:
            raise UserError("the task reads pictures; only text to image learns from a cache")
        if learned["vae"]:
            raise UserError(f"{learned['vae']} learns, so that its latents cannot be cached")
        ways = mesh.shape["data"] * mesh.shape["fsdp"]
        self.rows = -(-recipe.batch_size // ways) * ways  # of each batch
        self.model, self._mesh = task.model, mesh
        self._tensors = {part: tensors[part] for part in base.ENCODERS if not learned[part]}
        layout = sharding.layout(mesh, recipe.mesh.specs)
        self.params = read_params(self._tensors, "f32", layout)
        self._posterior = jax.jit(partial(_posterior, self.model))
        self._embeddings = jax.jit(partial(_embeddings, self.model))

    def posterior(self, images: np.ndarray) -> tuple[Array, Array]:
        """uint8 [B, H, W, 3] -> mean and std, float16 [B, h, w, C]; it is not waited for."""
        placed = sharding.place_batch({"image": images}, self._mesh)
        return self._posterior(self.params, placed)

    def embeddings(self, captions: list[str]) -> dict[str, Array]:
        """B texts -> `embeddings`, float16 [B, T, D]; nothing where they are not stored."""
        if "text_encoder" not in self._tensors:
            return {}
        ids = np.stack([base.tokens_of(self.model.tokenizer, caption) for caption in captions])
        placed = sharding.place_batch({"ids": ids}, self._mesh)
        return {"embeddings": self._embeddings(self.params, placed)}

    def shapes(self, size: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """[h, w, C] of an example's latents and [T, D] of its embeddings; nothing is computed."""
        image = jax.ShapeDtypeStruct((1, size, size, 3), np.uint8)
        mean, _ = jax.eval_shape(self._posterior, self.params, {"image": image})
        text = self.model.tokenizer.length, self.model.text_encoder.config.hidden_size
        return mean.shape[1:], text if "text_encoder" in self._tensors else ()

    def fingerprints(self) -> dict[str, str]:
        """Of what made the cache; empty for what is not stored."""
        made = {part: base.fingerprint(part, of) for part, of in self._tensors.items()}
        return dict.fromkeys(base.ENCODERS, "") | made


def _posterior(model: Model, params: Params, batch: base.Batch) -> tuple[Array, Array]:
    mean, std = base.posterior_of(model, params, batch)
    return mean.astype(np.float16), std.astype(np.float16)


def _embeddings(model: Model, params: Params, batch: base.Batch) -> Array:
    return base.text_of(model, params, batch).astype(np.float16)


def _write(folder: Path, reader: Reader, encoders: Encoders, progress: bool) -> Description:
    """Everything but the description, which it returns."""
    data, source, model = reader.data, reader.source, encoders.model
    latents, text = encoders.shapes(data.size)
    numbers = 2 * (1 + reader.flip) * math.prod(latents) + (math.prod(text) if text else 0)
    shards = -(-2 * numbers * len(source) // SHARD_BYTES)
    skipped = Tally(data.bad_share)
    with closing(_records(reader, encoders, skipped, progress)) as rows:
        count = write_records(folder, rows, shards)
    if not count:
        raise UserError(f"{source.ref}: all {len(source)} examples are bad; {skipped.first}")
    for name, words in encoders.embeddings([""] * encoders.rows).items():
        (folder / EMPTY).write_bytes(encode({"caption": "", name: np.asarray(words)[0]}))
    return Description(
        model=model.name,
        **encoders.fingerprints(),
        size=data.size,
        flip=reader.flip,
        caption=data.caption,
        source=source.fingerprint(),
        examples=count,
        skipped=skipped.bad,
        shards=shards,
        latents=latents,
        text=text,
        jaxgen=_version(),
    )


def _version() -> str:
    try:
        return metadata.version("jaxgen")
    except metadata.PackageNotFoundError:  # run from a folder that is not installed
        return "unknown"


def _records(
    reader: Reader, encoders: Encoders, skipped: Tally, progress: bool
) -> Generator[Example, None, None]:
    """What is stored of each good example, in order."""
    before: list[tuple[list[Example], dict[str, Array]]] = []
    with closing(_batches(reader, encoders.rows, skipped, progress)) as batches:
        for batch in chain(batches, [[]]):
            begun = [(batch, _encoded(encoders, batch))] if batch else []
            for example, record in chain(*(_fetched(*one) for one in before)):
                if _finite(record):
                    yield record
                else:
                    reason = "what the model makes of it is beyond float16"
                    skipped.add(0, [(reader.source.name(example["index"]), reason)])
            before = begun  # the devices make it while the next one is read


def _batches(
    reader: Reader, rows: int, skipped: Tally, progress: bool
) -> Generator[list[Example], None, None]:
    """The good examples of the source, in order; only the last batch may not be full."""
    data, total = reader.data, len(reader.source)
    reading = [read_ahead(reader, 0, -(-rows // PIECE), data.workers, data.threads)]
    waiting: list[Example] = []
    try:
        with tqdm(total=total, desc="caching", disable=not progress) as bar:
            for _ in range(reader.pieces):
                with lost():
                    piece = next(reading[0])
                seen = len(piece["good"]) + len(piece["bad"])
                skipped.add(seen, piece["bad"])
                waiting += piece["good"]
                while len(waiting) >= rows:
                    yield waiting[:rows]
                    waiting = waiting[rows:]
                bar.update(seen)
        if waiting:
            yield waiting
    finally:
        end(reading)


def _encoded(encoders: Encoders, good: list[Example]) -> dict[str, Array]:
    """What the model makes of a batch, padded to whole `rows`: there is one shape to compile."""
    padded = good + good[:1] * (encoders.rows - len(good))
    images = np.stack([example["image"] for example in padded])
    found = dict(zip(LATENTS, encoders.posterior(images)))
    if any(example["mirrors"] for example in good):
        mirrored = encoders.posterior(np.ascontiguousarray(images[:, :, ::-1]))
        found |= dict(zip(MIRRORED.values(), mirrored))
    return found | encoders.embeddings([example["caption"] for example in padded])


def _fetched(good: list[Example], made: dict[str, Array]) -> Iterator[tuple[Example, Example]]:
    """Each example of a batch, and its record."""
    found = {name: np.asarray(array) for name, array in made.items()}
    for row, example in enumerate(good):
        names = [n for n in found if example["mirrors"] or n not in MIRRORED.values()]
        yield example, {"caption": example["caption"]} | {name: found[name][row] for name in names}


def _finite(record: Example) -> bool:
    return all(np.isfinite(v).all() for v in record.values() if isinstance(v, np.ndarray))

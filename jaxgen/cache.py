"""What training would compute again each epoch, once: latents of pictures, embeddings of captions.

Numbers are stored as float16, which is half of the disk and of what is sent to the devices. It
rounds latents by some 2e-4 of their size, a hundredth of the least noise that training adds to them
(0.03 for Stable Diffusion), and is eight times finer than the bfloat16 that most runs compute in.
An example of which it cannot hold a number is no use to training either, and is skipped.
"""

import dataclasses
import logging
import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from functools import partial
from importlib import metadata
from itertools import islice
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from jaxgen import config, sharding
from jaxgen.data import transforms
from jaxgen.data.cached import DESCRIPTION, EMPTY, FIXED, LATENTS, MIRRORED, Description
from jaxgen.data.examples import BadExample, Example, Source
from jaxgen.data.pipeline import LEAST_DRAWN, MOST_NAMED, Images, prepared
from jaxgen.data.records import encode, write_records
from jaxgen.data.sources import open_source
from jaxgen.data.workers import check_grain, end, read_ahead
from jaxgen.denoiser import Model
from jaxgen.load import read_params
from jaxgen.save import check_new
from jaxgen.tasks import base
from jaxgen.training import setup
from jaxgen.training.recipe import Train
from jaxgen.types import Array, Params, UserError

SHARD_BYTES = 4 << 30
logger = logging.getLogger(__name__)


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
    mesh = sharding.training_mesh(**dataclasses.asdict(recipe.mesh))
    encoders = Encoders(recipe, mesh)
    ways = mesh.shape["data"] * mesh.shape["fsdp"]
    reader = Reader(data, source, -(-recipe.batch_size // ways) * ways, recipe.data.flip)

    out = out.resolve()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out.parent))
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    try:
        description = _write(scratch, reader, encoders, progress)
        config.write_json(scratch / DESCRIPTION, dataclasses.asdict(description))
        os.chmod(scratch, 0o755)
        if out.exists():
            out.rmdir()
        scratch.rename(out)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return out


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
    """n -> the good examples of batch n in the order of a source, and the bad ones with reasons.

    Each example has its `index`, its pixels as `image`, its `caption`, and whether it `mirrors`.
    """

    data: Images
    source: Source
    rows: int
    flip: bool  # whether any mirrors

    @property
    def batches(self) -> int:
        """Of all examples; the last one may not be full."""
        return -(-len(self.source) // self.rows)

    def __call__(self, n: int) -> dict[str, Any]:
        good, bad = [], []
        for i in range(n * self.rows, min((n + 1) * self.rows, len(self.source))):
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
        self.model, self._mesh = task.model, mesh
        self._tensors = {part: tensors[part] for part in base.ENCODERS if not learned[part]}
        self.params = read_params(self._tensors, "f32", sharding.layout(mesh))
        self._posterior = jax.jit(partial(_posterior, self.model))
        self._embeddings = jax.jit(partial(_embeddings, self.model))

    def posterior(self, images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [B, H, W, 3] -> mean and std, float16 [B, h, w, C]."""
        placed = sharding.place_batch({"image": images}, self._mesh)
        mean, std = self._posterior(self.params, placed)
        return np.asarray(mean), np.asarray(std)

    def embeddings(self, captions: list[str]) -> Example:
        """B texts -> `embeddings`, float16 [B, T, D]; nothing where they are not stored."""
        if "text_encoder" not in self._tensors:
            return {}
        ids = np.stack([base.tokens_of(self.model, caption) for caption in captions])
        placed = sharding.place_batch({"ids": ids}, self._mesh)
        return {"embeddings": np.asarray(self._embeddings(self.params, placed))}

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
    skipped = Skipped(data.bad_share)
    count = write_records(folder, _records(reader, encoders, skipped, progress), shards)
    if not count:
        raise UserError(f"{source.ref}: all {len(source)} examples are bad; {skipped.first}")
    for name, words in encoders.embeddings([""] * reader.rows).items():
        (folder / EMPTY).write_bytes(encode({"caption": "", name: words[0]}))
    return Description(
        model=model.name,
        **encoders.fingerprints(),
        size=data.size,
        flip=reader.flip,
        caption=data.caption,
        source=source.fingerprint(),
        examples=count,
        skipped=skipped.count,
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


class Skipped:
    """Counts and names bad examples; UserError where they are too many."""

    def __init__(self, share: float) -> None:
        self._share = share
        self._seen = self.count = 0
        self.first = ""

    def add(self, seen: int, bad: list[tuple[str, str]]) -> None:
        """What a batch brought: so many examples, and which of them are bad."""
        self._seen += seen
        for name, reason in bad:
            self.count += 1
            self.first = self.first or f"the first is {name}: {reason}"
            if self.count <= MOST_NAMED:
                logger.warning("skipped %s: %s", name, reason)
        if self.count > self._share * max(self._seen, LEAST_DRAWN):
            raise UserError(
                f"{self.count} of {self._seen} examples are bad, more than bad_share "
                f"{self._share:g}; {self.first}"
            )


def _records(
    reader: Reader, encoders: Encoders, skipped: Skipped, progress: bool
) -> Iterator[Example]:
    """What is stored of each good example, in order."""
    source, data = reader.source, reader.data
    reading = [read_ahead(reader, 0, data.workers, data.threads)]
    try:
        with tqdm(total=len(source), desc="caching", disable=not progress) as bar:
            for batch in islice(reading[0], reader.batches):
                read, bad = batch["good"], list(batch["bad"])
                seen = len(read) + len(bad)
                for example, record in zip(read, _encoded(encoders, read, reader.rows)):
                    if _finite(record):
                        yield record
                    else:
                        reason = "what the model makes of it is beyond float16"
                        bad.append((source.name(example["index"]), reason))
                skipped.add(seen, bad)
                bar.update(seen)
    finally:
        end(reading)


def _encoded(encoders: Encoders, good: list[Example], rows: int) -> Iterator[Example]:
    """The records of a batch, which is padded to `rows`: there is one shape to compile."""
    if not good:
        return
    padded = good + good[:1] * (rows - len(good))
    images = np.stack([example["image"] for example in padded])
    found = dict(zip(LATENTS, encoders.posterior(images)))
    if any(example["mirrors"] for example in good):
        mirrored = encoders.posterior(np.ascontiguousarray(images[:, :, ::-1]))
        found |= dict(zip(MIRRORED.values(), mirrored))
    found |= encoders.embeddings([example["caption"] for example in padded])
    for row, example in enumerate(good):
        names = [n for n in found if example["mirrors"] or n not in MIRRORED.values()]
        yield {"caption": example["caption"]} | {name: found[name][row] for name in names}


def _finite(record: Example) -> bool:
    return all(np.isfinite(v).all() for v in record.values() if isinstance(v, np.ndarray))

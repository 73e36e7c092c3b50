"""Folders that `jaxgen cache` writes: what the VAE and the text encoder make of each example.

`cache.json` says what of, and by which model. ArrayRecord files hold the examples: `mean` and `std`
of the latents, those of the mirrored picture where it may be mirrored, the `caption` in words and,
unless the text encoder learns, its `embeddings`. Those of no words are in a record of their own.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import config
from jaxgen.data import examples, records, transforms
from jaxgen.data.examples import BadExample, Example, Source
from jaxgen.types import UserError

DESCRIPTION = "cache.json"
EMPTY = "empty.safetensors"
LATENTS = ("mean", "std")
MIRRORED = {name: f"mirrored_{name}" for name in LATENTS}
FIXED: Mapping[str, Any] = {"crop": "center", "buckets": False, "columns": ()}  # of the data


@dataclasses.dataclass(frozen=True)
class Description:
    """What a cache holds, and what made it: the fields of `cache.json`."""

    model: str  # what it was loaded from
    vae: str  # a fingerprint of the parameters
    text_encoder: str  # empty where no embeddings are held
    size: int  # of the pictures
    flip: bool  # whether mirrored ones are held
    caption: str  # the column of captions that was asked for
    source: dict  # fingerprint of the data
    examples: int
    skipped: int  # bad ones
    shards: int
    latents: tuple[int, ...]  # [h, w, C]
    text: tuple[int, ...]  # [T, D]; empty without embeddings
    jaxgen: str  # the version that wrote it

    def settings(self) -> dict[str, Any]:
        """Fields of the data, and the one value of each that this cache can serve."""
        flip = {} if self.flip else {"flip": False}
        return {"size": self.size, "caption": self.caption, **FIXED, **flip}


def describe(ref: str) -> Description | None:
    """What the cache in a folder holds; None for what is none. UserError if it is damaged."""
    path = Path(ref, DESCRIPTION)
    try:
        if not ref or not path.is_file():
            return None
    except OSError:  # a name too long, a folder that is closed: opening it will tell
        return None
    data = config.read_json(path)
    absent = [f.name for f in dataclasses.fields(Description) if f.name not in data]
    if absent:
        raise UserError(f"{path} does not say {', '.join(absent)}; is it of another version?")
    return config.parse(Description, data, {}, str(path))


class Cached(Source):
    """The examples of a cache, in the order of the source that it was made from.

    Raises:
        UserError: for a folder that is not whole.
    """

    def __init__(self, ref: str, description: Description):
        self.ref = ref
        self.description = description
        files = sorted(Path(ref).glob("*.array_record"))
        if len(files) != description.shards:
            raise UserError(f"{ref} has {len(files)} of its {description.shards} files of records")
        self._source = records.open_records(ref, files)
        if len(self._source) != description.examples:
            held = f"{len(self._source)} of its {description.examples} examples"
            raise UserError(f"{ref} holds {held}; was it copied in full?")
        self._empty: Example = {}
        if description.text:
            try:
                empty = records.decode(Path(ref, EMPTY).read_bytes())
                self._empty = {"embeddings": empty["embeddings"].reshape(description.text)}
            except Exception as error:
                raise UserError(f"cannot read {Path(ref, EMPTY)}: {error}") from None

    def __len__(self) -> int:
        return self.description.examples

    def read(self, i: int, least: int | None = None) -> Example:
        # They were written turn by turn, and are read file by file.
        row, shard = divmod(i, self.description.shards)
        whole, rest = divmod(len(self), self.description.shards)
        with examples.guard(self.name(i)):
            record = records.decode(self._source[shard * whole + min(shard, rest) + row])
            examples.pick_caption(record, "caption", self.ref)
        self._check(record, i)
        return record

    def _check(self, record: Example, i: int) -> None:
        latents, text = self.description.latents, self.description.text
        wanted = dict.fromkeys(LATENTS, latents) | dict.fromkeys(self._empty, text)
        wanted |= {name: latents for name in MIRRORED.values() if name in record}
        for name, shape in wanted.items():
            found = record.get(name)
            if not isinstance(found, np.ndarray) or found.shape != shape or found.dtype.kind != "f":
                raise BadExample(self.name(i), f"{name!r} is not of shape {list(shape)}")

    def draw(self, i: int, flip: bool, dropout: float, rng: np.random.Generator) -> Example:
        """Example i, mirrored or not, with its words or none.

        The same numbers are drawn as for a picture, and so the same examples are chosen.
        """
        example = examples.patiently(self.read, i)
        if flip and rng.random() < 0.5 and MIRRORED["mean"] in example:
            example |= {name: example[other] for name, other in MIRRORED.items()}
        example = transforms.drop_caption(example, dropout, rng)
        if not example["caption"]:
            example |= self._empty
        return {name: example[name] for name in (*LATENTS, *self._empty, "caption")}

    def size(self, i: int) -> tuple[int, int]:
        return self.description.size, self.description.size

    def name(self, i: int) -> str:
        return examples.printable(f"{self.ref}[{i}]")

    def fingerprint(self) -> dict[str, Any]:
        names = ("source", "vae", "text_encoder")
        return super().fingerprint() | {n: getattr(self.description, n) for n in names}

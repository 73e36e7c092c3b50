"""Datasets that tensorflow-datasets has prepared as ArrayRecord, read without TensorFlow."""

import re
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data import examples
from jaxgen.data.examples import CAPTIONS, BadExample, Example, Source
from jaxgen.types import UserError

PREFIX = "tfds:"
_REF = re.compile(r"(?P<name>[^:]+)(?::(?P<version>\d+\.\d+\.\d+))?:(?P<split>[A-Za-z_].*)")


class Tfds(Source):
    """A split of a prepared dataset: its `image`, a caption, and the further features.

    Images and masks stay encoded until they are read, so that the limits for files hold for them.
    Without a column of captions, a class label is one, by the name of its class.

    Args:
        ref: "tfds:NAME[/CONFIG][:VERSION]:SPLIT" or "tfds:FOLDER:SPLIT"; a split may be a part,
            such as "train[:90%]".
        caption, columns: as for `Folder`.

    Raises:
        UserError: for a dataset, split or column that is not there, and for one not prepared;
            nothing is ever downloaded.
    """

    def __init__(self, ref: str, caption: str = "", columns: tuple[str, ...] = ()):
        self.ref = ref
        parts = _REF.fullmatch(ref.removeprefix(PREFIX))
        if parts is None:
            raise UserError(f"{ref} is not tfds:NAME[/CONFIG][:VERSION]:SPLIT or tfds:FOLDER:SPLIT")
        features, encoded, self._dataset, self._source = _open(ref, **parts.groupdict())
        self._split = parts["split"]
        if "image" not in features:
            raise UserError(f"{ref} has no feature 'image'; it has {', '.join(features)}")
        shown = dict.fromkeys(features, "")
        label = caption or ("" if any(name in features for name in CAPTIONS) else "label")
        self._classes = getattr(features.get(label), "names", None)
        self._caption = caption if self._classes is None else label
        examples.pick_caption(shown, self._caption, ref)
        found = examples.pick_pictures(shown, columns, ref)
        self._pictures = {"image": "image"} | {c: c for c in columns if c in encoded} | found
        self._unread = encoded
        if not len(self._source):
            raise UserError(f"{ref} holds no examples")

    def __len__(self) -> int:
        return len(self._source)

    def _record(self, i: int) -> Example:
        with examples.guard(self.name(i)):
            return self._source[i]

    def read(self, i: int, least: int | None = None) -> Example:
        record = self._record(i)
        example = {k: _plain(v) for k, v in record.items() if k not in self._unread}
        with examples.guard(self.name(i)):
            if self._classes:
                label = int(record[self._caption])
                if not 0 <= label < len(self._classes):  # test splits have -1, which is unknown
                    raise BadExample(
                        self.name(i), f"{self._caption!r} is {label}, which is no class"
                    )
                example["caption"] = self._classes[label].replace("_", " ")
            else:
                example["caption"] = examples.pick_caption(example, self._caption, self.ref)
        for column, key in self._pictures.items():
            example[column] = examples.decode(record[key], column, self.name(i), least)
        return example

    def fingerprint(self) -> dict[str, Any]:
        some = examples.crc_of_some(self, lambda i: bytes(self._source[i]["image"]))
        held = {"dataset": self._dataset, "split": self._split, "some_pictures": some}
        return super().fingerprint() | held

    def size(self, i: int) -> tuple[int, int]:
        """As for any source, but the whole record is read: it is found in no other way."""
        return examples.size(self._record(i)["image"], self.name(i))

    def name(self, i: int) -> str:
        return examples.printable(f"{self.ref}[{i}]")


def _plain(value: Any) -> Any:
    """Bytes as text, alone or in lists."""
    if isinstance(value, np.ndarray) and value.dtype.kind in "OS":
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _open(
    ref: str, name: str, version: str | None, split: str
) -> tuple[dict[str, Any], set[str], str, Any]:
    """Features of a prepared dataset, those that are pictures, its name, and access to a split."""
    try:
        import tensorflow_datasets as tfds
    except ImportError:
        raise UserError(f"{ref} needs tensorflow-datasets: pip install 'jaxgen[data]'") from None

    is_folder = Path(name).is_dir()
    try:
        if is_folder:
            builder = tfds.builder_from_directory(name)
        else:
            full = f"{name}:{version}" if version else name
            builder = tfds.builder(full, file_format="array_record")
        features = dict(builder.info.features.items())
        encoded = {k for k, v in features.items() if isinstance(v, tfds.features.Image)}
        decoders = {k: tfds.decode.SkipDecoding() for k in encoded}
        source = builder.as_data_source(split=split, decoders=decoders)
        return features, encoded, builder.info.full_name, source
    except Exception as error:
        reason = str(error).strip().split("\n")[0].strip(" .") or type(error).__name__
        if not is_folder:
            reason += f"; prepare it once: tfds build {name} --file_format=array_record"
        raise UserError(f"cannot open {ref}: {reason[:300]}") from None

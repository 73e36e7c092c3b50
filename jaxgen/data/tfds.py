"""Datasets that tensorflow-datasets has prepared as ArrayRecord, read without TensorFlow."""

import re
from pathlib import Path
from typing import Any

from jaxgen.data import examples
from jaxgen.data.examples import CAPTIONS, Example, Source
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
        features, encoded, self._source = _open(ref, **parts.groupdict())
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
        if self._classes:
            example["caption"] = self._classes[record[self._caption]].replace("_", " ")
        else:
            with examples.guard(self.name(i)):
                example["caption"] = examples.pick_caption(example, self._caption, self.ref)
        for column, key in self._pictures.items():
            example[column] = examples.decode(record[key], column, self.name(i), least)
        return example

    def size(self, i: int) -> tuple[int, int]:
        return examples.size(self._record(i)["image"], self.name(i))

    def name(self, i: int) -> str:
        return examples.printable(f"{self.ref}[{i}]")


def _plain(value: Any) -> Any:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _open(
    ref: str, name: str, version: str | None, split: str
) -> tuple[dict[str, Any], set[str], Any]:
    """Features of a prepared dataset, those that are pictures, and random access to a split."""
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
        return features, encoded, builder.as_data_source(split=split, decoders=decoders)
    except Exception as error:
        reason = str(error).strip().split("\n")[0].strip(" .") or type(error).__name__
        if not is_folder:
            reason += f"; prepare it once: tfds build {name} --file_format=array_record"
        raise UserError(f"cannot open {ref}: {reason[:300]}") from None

"""`jaxgen evaluate`: how well pictures show what was asked for."""

import dataclasses
import platform
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tyro.conf import Positional

from jaxgen import config, terminal
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.types import UserError

if TYPE_CHECKING:
    from jaxgen.data.examples import Source
    from jaxgen.evaluation.report import Judges, Report

HELD = "emoji_scenes:validation"


@dataclass(frozen=True)
class Evaluate:
    """Judge pictures by their captions, and print a table.

    jaxgen sample "a fox, flat style, on a red background" --count 64 --out foxes

    jaxgen evaluate foxes --json foxes.json

    jaxgen evaluate foxes emoji_scenes:test --count 64      # beside real scenes: the ceiling

    jaxgen evaluate foxes --against emoji_scenes:validation     # KID, too

    Pictures of 64x64 are judged on what their captions say in the words of emoji_scenes: subjects,
    style, background, what lies where. All have a CLIP score, which means nothing for what the CLIP
    has not learned: the embedded model's knows emoji_scenes alone. Nor is it independent of the
    embedded model, whose text encoder began as that CLIP's. With `--against` pictures are compared
    with others as a whole: by KID in the CLIP's image features, which is not the KID of papers, and
    with `--inception` by FID and KID.
    """

    sources: Positional[tuple[str, ...]]
    """Folders that `jaxgen sample` filled, or any sources of training data; a column each."""
    json: Path | None = None
    """A file for the figures; one that is there is replaced."""
    count: int | None = None
    """How many pictures of each, the first ones; all by default."""
    clip: Path = EMBEDDED_CLIP
    """A folder of transformers' CLIPModel; by default the embedded model's."""
    inception: Path | None = None
    """InceptionV3 in safetensors, as train/port_inception.py makes it."""
    against: str | None = None
    """Real pictures to compare with: the last of them, as many as are evaluated, or all where there
    are fewer. With --inception, emoji_scenes:validation by default."""

    def run(self) -> None:
        """Reads the judges, then the pictures; prints."""
        from jaxgen.evaluation import report  # slow to import

        against = self.against or (HELD if self.inception else None)
        if not self.sources or not all(self.sources):
            raise UserError("there is nothing to evaluate; name a folder of samples")
        if self.json is not None and (
            self.json.is_dir() or not self.json.absolute().parent.is_dir()
        ):
            raise UserError(f"--json {self.json} is no place for a file")
        terminal.use_compile_cache()
        with terminal.notices_after():
            opened = {ref: self._opened(ref, against) for ref in self.sources}
            judges = report.Judges.read(self.clip, self.inception)
            found = {ref: self._judged(judges, *pair) for ref, pair in opened.items()}
        print(report.table(found))
        if self.json is not None:
            config.write_json(self.json, self._record(found, against))

    def _opened(self, ref: str, against: str | None) -> "tuple[Source, int, Source | None]":
        """One source, how many pictures of it, and what it is compared with."""
        from jaxgen.evaluation import report

        source = report.open_pictures(ref)
        count = report.counted(source, self.count)
        if against is None:
            return source, count, None
        others = report.open_pictures(against)
        for name, some in ((ref, count), (against, len(others))):
            if some < 2:
                raise UserError(f"{name}: a single picture has no FID or KID; take two or more")
        if _same(ref, against) and count + min(count, len(others)) > len(others):
            raise UserError(
                f"{ref} would be compared with itself: name other pictures (--against), or at "
                f"most half of its {len(others)} (--count)"
            )
        return source, count, others

    def _judged(
        self, judges: "Judges", source: "Source", count: int, others: "Source | None"
    ) -> "Report":
        """The figures of a source, beside as many real pictures if there are."""
        from jaxgen.evaluation import report

        real: list[np.ndarray] = []
        if others is not None:
            real, _ = report.read_all(others, min(count, len(others)), last=True, progress=True)
        images, captions = report.read_all(source, count, progress=True)
        return report.evaluate(judges, images, captions, real, progress=True)

    def _record(self, found: "dict[str, Report]", against: str | None) -> dict[str, Any]:
        """What was measured, of what, and by what."""
        from jaxgen.evaluation import report

        record: dict[str, Any] = {"clip": str(self.clip)}
        if against is not None:
            record["against"] = against
        if self.inception is not None:
            record["inception"] = str(self.inception)
        versions = {name: version(name) for name in ("jaxgen", "jax", "flax", "numpy", "pillow")}
        record["versions"] = {"python": platform.python_version(), **versions}
        record["sources"] = {
            ref: {"made_with": report.made_with(ref, each.pictures), **dataclasses.asdict(each)}
            for ref, each in found.items()
        }
        return record


def _same(ref: str, other: str) -> bool:
    """Whether two names are of the same pictures: of one folder, or of one split."""
    if Path(ref).exists() and Path(other).exists():
        return Path(ref).resolve() == Path(other).resolve()
    whole = {"emoji_scenes": "emoji_scenes:train", "emoji_scenes:": "emoji_scenes:train"}
    return whole.get(ref, ref) == whole.get(other, other)

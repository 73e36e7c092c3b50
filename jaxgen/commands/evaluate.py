"""`jaxgen evaluate`: how well pictures show what was asked for."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from jaxgen import config, terminal
from jaxgen.refs import EMBEDDED_CLIP
from jaxgen.types import UserError


@dataclass(frozen=True)
class Evaluate:
    """Judge pictures by their captions, and print a table.

    jaxgen sample "a fox, flat style, on a red background" --count 64 --out foxes

    jaxgen evaluate foxes --json foxes.json

    jaxgen evaluate emoji_scenes:test --count 500      # real scenes: the ceiling

    Pictures of 64x64 are judged on what their captions say in the words of emoji_scenes: subjects,
    style, background, what lies where. All have a CLIP score, which means nothing for what the CLIP
    has not learned: the embedded model's knows emoji_scenes alone. With `--inception` they are
    compared with other pictures as a whole (FID, KID).
    """

    source: Positional[str]
    """A folder that `jaxgen sample` filled, or any source of training data."""
    json: Path | None = None
    """A file for the figures; one that is there is replaced."""
    count: int | None = None
    """How many pictures, the first ones; all by default."""
    clip: Path = EMBEDDED_CLIP
    """A folder of transformers' CLIPModel; by default the embedded model's."""
    inception: Path | None = None
    """InceptionV3 in safetensors, as train/port_inception.py makes it."""
    against: str = "emoji_scenes:validation"
    """Real pictures for FID and KID; the last of them, as many as are evaluated."""

    def run(self) -> None:
        """Reads the judges, then the pictures; prints."""
        from jaxgen.evaluation import report  # slow to import

        if self.json is not None and (
            self.json.is_dir() or not self.json.absolute().parent.is_dir()
        ):
            raise UserError(f"--json {self.json} is no place for a file")
        if self.inception is not None and self.against == self.source:
            raise UserError(f"--against {self.against} would compare pictures with themselves")
        terminal.use_compile_cache()
        with terminal.notices_after():
            judges = report.Judges.read(self.clip, self.inception)
            images, captions = report.read_all(report.open_pictures(self.source), self.count)
            real: list[np.ndarray] = []
            if self.inception is not None:
                source = report.open_pictures(self.against)
                real, _ = report.read_all(source, min(len(images), len(source)), last=True)
            found = report.evaluate(judges, images, captions, real)
        print(report.table(found))
        if self.json is not None:
            made_with = {"source": self.source, "clip": str(self.clip)}
            if self.inception is not None:
                made_with |= {"inception": str(self.inception), "against": self.against}
            config.write_json(self.json, made_with | dataclasses.asdict(found))

"""`jaxgen evaluate`: how well pictures show what was asked for."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from jaxgen import config, terminal
from jaxgen.types import UserError


@dataclass(frozen=True)
class Evaluate:
    """Judge pictures by their captions, and print a table.

    jaxgen sample "a fox, flat style, on a red background" --count 64 --out foxes

    jaxgen evaluate foxes --json foxes.json

    jaxgen evaluate emoji_scenes:test --count 500      # real scenes: the ceiling

    Pictures of 64x64 are judged on what their captions say in the words of emoji_scenes: subjects,
    style, background, what lies where. All have a CLIP score. With `--inception` they are compared
    with other pictures as a whole (FID, KID).
    """

    source: Positional[str]
    """A folder that `jaxgen sample` filled, or any source of training data."""
    json: Path | None = None
    """A file for the figures; one that is there is replaced."""
    count: int | None = None
    """How many pictures, the first ones; all by default."""
    clip: Path | None = None
    """A folder of transformers' CLIPModel; by default the embedded model's."""
    inception: Path | None = None
    """InceptionV3 in safetensors, as train/port_inception.py makes it."""
    against: str = "emoji_scenes:test"
    """Real pictures for FID and KID, as many."""

    def run(self) -> None:
        """Reads, judges, prints."""
        from jaxgen.evaluation import report  # slow to import
        from jaxgen.load import ASSETS

        if self.json is not None and not self.json.absolute().parent.is_dir():
            raise UserError(f"--json {self.json}: there is no folder {self.json.parent}")
        terminal.use_compile_cache()
        with terminal.notices_after():
            images, captions = report.read_all(report.open_pictures(self.source), self.count)
            real: list[np.ndarray] = []
            if self.inception is not None:
                source = report.open_pictures(self.against)
                real, _ = report.read_all(source, min(len(images), len(source)))
            clip = self.clip or ASSETS / "mini" / "clip"
            found = report.evaluate(images, captions, clip, self.inception, real)
        print(report.table(found))
        if self.json is not None:
            config.write_json(self.json, {"source": self.source} | dataclasses.asdict(found))

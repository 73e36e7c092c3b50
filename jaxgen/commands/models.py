"""`jaxgen info` and `jaxgen convert`: model folders and files."""

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from jaxgen.load import describe, load
from jaxgen.save import check_new, save


@dataclass(frozen=True)
class Info:
    """Show what a model holds: parts, sizes, prediction type, branches."""

    ref: Positional[str]
    """A folder, a hub id or a single safetensors file."""

    def run(self) -> None:
        """Reads headers alone."""
        print(describe(self.ref))


@dataclass(frozen=True)
class Convert:
    """Write a model as a folder that diffusers loads, in safetensors.

    jaxgen convert v1-5-pruned.safetensors sd15
    """

    src: Positional[str]
    """A folder, a hub id or a single safetensors file."""
    dst: Positional[Path]
    """A new or empty folder."""
    dtype: str | None = None
    """f32 or bf16; by default each tensor keeps its own."""
    prediction: str | None = None
    """What the network predicts, where a single file does not say: epsilon or v_prediction."""

    def run(self) -> None:
        """All of it or nothing."""
        check_new(self.dst)
        save(*load(self.src, dtype=self.dtype, prediction=self.prediction), self.dst)
        print(f"{self.src} is now in {self.dst}")

"""A folder of samples: pictures that carry their settings, a list of them, a grid."""

import json
import re
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import generate
from jaxgen.data import images
from jaxgen.denoiser import Model
from jaxgen.request import Plan
from jaxgen.types import Params, UserError

GRID = 64  # pictures at most in grid.png


class Writer:
    """Writes the images of a plan as they are finished.

    A folder that holds samples already is added to: numbers go on where they stopped. Renamed to
    `metadata.jsonl`, the list makes the folder a training folder.
    """

    def __init__(self, folder: Path, model: Model, checked: Plan):
        """Makes the folder, or raises UserError if nothing can be written there."""
        self.folder, self.model, self.checked = folder, model, checked
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
            numbers = [int(p.stem) for p in folder.glob("*.png") if re.fullmatch(r"\d+", p.stem)]
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
        self.first = max(numbers, default=-1) + 1
        self.count = 0

    def write_all(self, params: Params) -> None:
        """Samples and writes everything, with a progress bar."""
        shown: dict[int, np.ndarray] = {}
        try:
            for index, image in generate.run(self.model, params, self.checked, progress=True):
                self._write(index, image)
                if index < GRID:
                    shown[index] = image
        finally:
            if shown:
                grid = images.grid(np.stack([shown[i] for i in sorted(shown)]))
                images.save_png(self.folder / "grid.png", grid, f"{len(shown)} pictures")

    def _write(self, index: int, image: np.ndarray) -> None:
        settings = self._settings(index)
        name = f"{self.first + index:05}.png"
        text = images.parameters_text(
            settings["text"],
            settings["negative"],
            settings["steps"],
            settings["sampler"],
            settings["guidance"],
            settings["seed"],
            self.checked.size,
            Path(self.model.name).name,
            karras=self.checked.schedule.use_karras_sigmas,
            index=settings["index"],
        )
        images.save_png(self.folder / name, image, text)
        # After the picture, on one line: who reads the list finds every file it names.
        with (self.folder / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"file_name": name} | settings, ensure_ascii=False) + "\n")
        self.count += 1

    def _settings(self, index: int) -> dict[str, Any]:
        request = self.checked.request
        width, height = self.checked.size
        return {
            "text": request.prompts[index // request.count],
            "negative": request.negative,
            "seed": request.seed,
            "index": index % request.count,
            "steps": request.steps,
            "sampler": self.checked.schedule.sampler,
            "guidance": request.guidance,
            "size": f"{width}x{height}",
            "model": self.model.name,
        }

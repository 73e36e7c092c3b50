"""A folder of samples: pictures that carry their settings, a list of them, a grid."""

import contextlib
import os
import re
import tempfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import generate, locks
from jaxgen.data import images
from jaxgen.data.folder import add_line
from jaxgen.data.hints import Hint
from jaxgen.denoiser import Model
from jaxgen.plan import Plan
from jaxgen.types import Params, UserError
from jaxgen.weights import files
from jaxgen.weights.files import Tensors

GRID = 64  # pictures at most in grid.png
LIST = "samples.jsonl"


def identity(
    model: Model, checked: Plan, tensors: Mapping[str, Tensors], dtype: str = "f32"
) -> dict[str, Any]:
    """What decides a plan's pictures beside noise and prompts: what a seed is good for.

    Weights, the model's `tensors`, count by a few values of each, hints by their pixels, and the
    settings that are seldom used as one text.
    """
    request = checked.request
    control = [f"{zlib.crc32(hint.picture.tobytes()):08x}{hint.strength}" for hint in checked.hints]
    whole, (low, high) = (0.0, 1.0), request.guidance_interval
    interval = "" if (low, high) == whole else f"{low:g} to {high:g}"
    further = {
        "image_guidance": checked.image_guidance if checked.edits else 0.0,
        "rescale": request.rescale,
        "eta": request.eta,
        "clip_skip": request.clip_skip,
        "karras": checked.schedule.use_karras_sigmas,
        "guess": request.guess,
        "image": zlib.crc32(checked.image.tobytes()) if checked.image.size else 0,
        "mask": zlib.crc32(checked.pixel_mask.tobytes()) if checked.mask.size else 0,
        "start": checked.start,
        "share": checked.share if checked.share != 1 else 0,
        "guidance_interval": interval,
    }
    return {
        "sampler": checked.schedule.sampler,
        "steps": request.steps,
        "guidance": float(request.guidance),
        "model": _called(model),
        "weights": files.fingerprint(tensors),
        "prediction": checked.schedule.prediction_type,
        "negative": request.negative,
        "dtype": dtype,
        "control": "; ".join(control),
        "further": ", ".join(f"{name} {value}" for name, value in further.items() if value),
    }


def _called(model: Model) -> str:
    """The last name of a model's folder, file or hub id, also where the folder is `.`."""
    return Path(os.path.abspath(model.name)).name


@contextlib.contextmanager
def writing(folder: Path, model: Model, checked: Plan, dtype: str = "f32") -> Iterator["Writer"]:
    """A writer to a folder that is held, and is made where there is none.

    Of what was made, nothing stays if nothing is written.

    Raises:
        UserError: if nothing can be written there, or another run is writing.
    """
    made: list[Path] = []
    lock = None
    try:
        try:
            made = [path for path in (folder, *folder.parents) if not path.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            lock = locks.hold(folder, "--out")
            first = _next_number(folder)
        except OSError as error:
            raise UserError(f"cannot write to {folder}: {error.strerror or error}") from None
        yield Writer(folder, model, checked, dtype, first)
    finally:
        for path in made:
            with contextlib.suppress(OSError):  # it holds something, or was not made
                path.rmdir()
        if lock is not None:
            os.close(lock)


def _next_number(folder: Path) -> int:
    """Of the first picture to come. Raises OSError if the list of pictures cannot be written."""
    path = folder / LIST
    tempfile.TemporaryFile(dir=folder).close()  # pictures can be made there, too
    known = path.exists()
    path.open("a").close()
    if not known:  # until there is a picture to list
        path.unlink()
    numbers = [int(p.stem) for p in folder.glob("*.png") if re.fullmatch(r"\d+", p.stem)]
    return max(numbers, default=-1) + 1


class Writer:
    """Writes the images of a plan as they are finished.

    A folder that holds samples already is added to: numbers go on where they stopped. Renamed to
    `metadata.jsonl`, the list makes the folder a training folder. `writing` makes one. Settings of
    one picture alone may be added to `of_picture`, by its index, before it comes.
    """

    def __init__(self, folder: Path, model: Model, checked: Plan, dtype: str, first: int):
        """The folder is there, and `first` is the number of the first picture."""
        self.folder, self.model, self.checked, self.dtype = folder, model, checked, dtype
        self.of_picture: dict[int, dict[str, Any]] = {}
        self.list, self.first, self.count = folder / LIST, first, 0

    def write_all(self, params: Params) -> None:
        """Samples and writes everything, with a progress bar."""
        self.write(generate.run(self.model, params, self.checked, progress=True))

    def write(self, pictures: Iterable[tuple[int, np.ndarray]]) -> None:
        """Writes (index, uint8 [H, W, 3]) as they come; the grid in the end, come what may."""
        shown: dict[int, np.ndarray] = {}
        try:
            for index, image in pictures:
                self._write(index, image)
                if index < GRID:
                    shown[index] = image
        finally:
            if shown:
                grid = images.grid(np.stack([shown[i] for i in sorted(shown)]))
                images.save_png(self.folder / "grid.png", grid, f"{len(shown)} pictures")

    def _write(self, index: int, image: np.ndarray) -> None:
        more = self.of_picture.get(index, {})
        settings = self._settings(index) | more
        name = f"{self.first + index:05}.png"
        text = images.parameters_text(
            settings["text"],
            settings["negative"],
            settings["steps"],
            settings["sampler"],
            settings["guidance"],
            settings["seed"],
            self.checked.size,
            _called(self.model),
            karras=self.checked.schedule.use_karras_sigmas,
            index=settings["index"],
            **self._further() | more,
        )
        images.save_png(self.folder / name, image, text)
        # After the picture, on one line: who reads the list finds every file it names.
        add_line(self.list, {"file_name": name} | settings)
        self.count += 1

    def _further(self) -> dict[str, Any]:
        """The settings that are not at their defaults, as readers of PNGs name them."""
        request, checked = self.checked.request, self.checked
        predicts = checked.schedule.prediction_type
        further: dict[str, Any] = {
            "prediction": predicts if predicts != "epsilon" else None,
            "image_guidance": checked.image_guidance if checked.edits else None,
            "guidance_rescale": request.rescale or None,
            "eta": request.eta or None,
            # A1111 counts the layer that is read from the end, from 1.
            "clip_skip": request.clip_skip + 1 if request.clip_skip else None,
            "denoising_strength": None,
            "mask": "yes" if checked.mask.size else None,
            "control": _controls(checked.hints) or None,
            "guess": "yes" if request.guess else None,
            "latents": "from a file" if request.latents is not None else None,
            "dtype": self.dtype if self.dtype != "f32" else None,
        }
        if request.guidance_interval != (0.0, 1.0):
            further["guidance_interval"] = "{:g} to {:g}".format(*request.guidance_interval)
        if checked.image.size and not checked.edits:
            further["denoising_strength"] = checked.strength
        return further

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


def _controls(hints: list[Hint]) -> str:
    """The hints of a request, as the command's options name them."""
    return "; ".join(f"{hint.name or 'an array'}{hint.strength}" for hint in hints)

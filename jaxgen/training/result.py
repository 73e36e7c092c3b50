"""The model folder that a run ends with: whole, of a known step, and in nobody else's place."""

import os
import shutil
from pathlib import Path

from jaxgen import config
from jaxgen.denoiser import Model
from jaxgen.load import open_model
from jaxgen.save import check_new, save
from jaxgen.training.checkpoint import code
from jaxgen.types import Params, UserError

MARK = "training.json"  # in the folder: {"step": 1000}
UNFINISHED = ".unfinished"  # beside it


def step_of(folder: Path) -> int | None:
    """The step of the model in a folder; None where there is none of a run, or not all of it."""
    try:
        step = config.read_json(folder / MARK).get("step")
        open_model(folder)  # reads every header
    except UserError:
        return None
    return step if isinstance(step, int) else None


def check_place(folder: Path, goes_on: bool) -> None:
    """UserError where nothing can be written, or where the end of a run would replace a stranger.

    Args:
        goes_on: whether the run has a checkpoint, and so may replace a model that it made before.
    """
    if goes_on and (folder / MARK).is_file():
        return
    try:
        check_new(folder)
    except UserError as error:
        raise UserError(f"{error} (out)") from None


def write(model: Model, params: Params, folder: Path, step: int) -> None:
    """Writes or replaces the folder, all or nothing."""
    scratch = discard(folder)
    try:
        save(model, params, scratch / "new")
        config.write_json(scratch / "new" / MARK, {"step": step})
        if folder.exists():
            folder.rename(scratch / "old")
        (scratch / "new").rename(folder)
    except (OSError, UserError) as error:
        number = code(error)
        reason = os.strerror(number) if number else str(error)
        raise UserError(f"cannot write {folder}: {reason}") from None
    finally:
        discard(folder)


def discard(folder: Path) -> Path:
    """Removes what a killed run left half-written; where it would be."""
    scratch = folder.parent / UNFINISHED
    shutil.rmtree(scratch, ignore_errors=True)
    return scratch

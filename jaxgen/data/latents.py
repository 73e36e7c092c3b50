"""Starting noise from files: a plain array, or a seed with the settings that it was found for."""

import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.types import UserError

MAX_BYTES = 1 << 30
TEXTS = (
    *("sampler", "model", "weights", "prediction"),
    *("negative", "dtype", "control", "further"),
)
SETTINGS = (*TEXTS, "steps", "guidance")  # what a seed was found under; old ones lack some


def read_latents(path: Path) -> tuple[np.ndarray, dict[str, Any]]:
    """The noise in a `.npy` [N, h, w, C], or in a `seed.npz` with the settings it needs.

    Raises:
        UserError: for files that are missing, damaged, too large, or of another kind.
    """
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UserError(
                f"{path} is larger than {MAX_BYTES >> 20} MiB; is it a file of latents?"
            )
        if path.suffix == ".npy":
            # Mapped, so that a header that promises too much allocates nothing.
            return np.array(np.load(path, mmap_mode="r", allow_pickle=False)), {}
        if path.suffix == ".npz":
            with zipfile.ZipFile(path) as archive_file:
                if sum(member.file_size for member in archive_file.infolist()) > MAX_BYTES:
                    raise UserError(f"{path} unpacks to more than {MAX_BYTES >> 20} MiB")
            with np.load(path, allow_pickle=False) as archive:
                held = {name: archive[name] for name in archive.files}
            if "noise" not in held:
                raise UserError(f"{path} holds no array named noise; is it a seed.npz?")
            settings = {k: held[k].item() for k in SETTINGS if k in held}
            texts = [k for k in settings if isinstance(settings[k], str)]
            if set(texts) != set(TEXTS) & set(settings):
                raise UserError(f"{path}: steps and guidance are numbers, the rest should be texts")
            return held["noise"], settings
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    except Exception as error:  # damaged files raise whatever zipfile, zlib and ast do
        raise UserError(f"{path} is damaged or no file of latents: {error}") from None
    raise UserError(f"{path} is neither .npy (latents) nor .npz (a seed)")


def check_settings(path: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """A seed shows what it was found for under its own settings alone; UserError names the rest."""
    found = {k: Path(v).name if k == "model" else v for k, v in found.items()}
    if found.get("weights") == settings["weights"]:  # whatever the folder is called now
        found["model"] = settings["model"]
    wrong = [
        f"{name} {found[name] or 'none'} (here {settings[name] or 'none'})"
        for name in SETTINGS
        if name in found and not _same(found[name], settings[name])
    ]
    if wrong:
        raise UserError(f"{path} was found under {', '.join(wrong)}; use the same")


def _same(a: Any, b: Any) -> bool:
    """Equal, or equal as numbers of float32."""
    return a == b or (not isinstance(a, str) and math.isclose(a, b, rel_tol=1e-6))

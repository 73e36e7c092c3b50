"""Seeds on disk: each with the settings under which alone it shows what it was found for."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.data import images, latents
from jaxgen.types import UserError


def write(path: Path, noise: np.ndarray, settings: Mapping[str, Any]) -> None:
    """Writes standard normal noise [N, h, w, C] and its settings as a `seed.npz`, whole or not.

    Args:
        settings: texts and numbers; those of `output.identity` must be the same where the seed is
            used, the others say where it came from.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    held: dict[str, Any] = {name: np.asarray(value) for name, value in settings.items()}
    held["noise"] = noise.astype(np.float32)
    try:
        try:
            with scratch.open("wb") as file:
                np.savez(file, **held)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def read(
    path: Path, shape: Sequence[int], settings: Mapping[str, Any], prompt: str | None = None
) -> np.ndarray:
    """The seeds [M, h, w, C] of a file, or of those `.npz` files of a folder that fit.

    Args:
        shape: h, w, C that they must have.
        settings: of `output.identity`, under which they are to be used.
        prompt: that seeds of a folder must have been found for; what a file holds was asked for.

    Raises:
        UserError: where there are none, or none fits.
    """
    if not path.is_dir():
        return _read(path, shape, settings, None)
    paths = sorted(p for p in path.iterdir() if re.fullmatch(r"\d+\.npz", p.name))
    if not paths:
        raise UserError(f"{path} holds no seeds (00000.npz ...)")
    found, refused = [], []
    for file in paths:
        try:
            found.append(_read(file, shape, settings, prompt))
        except UserError as error:
            refused.append(error)
    if not found:
        raise UserError(f"none of the seeds in {path} fits: {refused[0]}")
    if refused:
        left = f"{len(refused)} of {len(paths)} seeds in {path} are left out"
        images.warn_once(f"{left}: {refused[0]}")
    return np.concatenate(found)


def _read(
    file: Path, shape: Sequence[int], settings: Mapping[str, Any], prompt: str | None
) -> np.ndarray:
    noise, under = latents.read_latents(file)
    if noise.dtype != np.float32 or noise.ndim != 4 or noise.shape[1:] != tuple(shape):
        wanted = ", ".join(map(str, ["N", *shape]))
        raise UserError(
            f"{file} is {noise.dtype} {list(noise.shape)}, and must be float32 [{wanted}]"
        )
    latents.check_settings(file, under, settings)
    if prompt is not None:
        with np.load(file, allow_pickle=False) as held:
            about = str(held["prompt"]) if "prompt" in held else None
        if about != prompt:
            raise UserError(f"{file} was found for {about!r} (here {prompt!r})")
    if not np.isfinite(noise).all():
        raise UserError(f"{file} holds numbers that are not finite")
    return noise

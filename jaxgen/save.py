"""Model folders out: what diffusers loads."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen import config, trees
from jaxgen.denoiser import Model
from jaxgen.load import PARTS
from jaxgen.types import Params, UserError
from jaxgen.weights import files, rename


def save(model: Model, params: Params, folder: str | Path) -> None:
    """Writes a folder that diffusers loads, all or nothing; into an empty one, the index last.

    Tensors keep their dtype. Raises UserError if `folder` exists and is not empty, or cannot be
    written.
    """
    folder = Path(folder).resolve()
    check_new(folder)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = folder if folder.exists() else folder.parent
        partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=beside))
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    try:
        _write(model, params, partial)
        os.chmod(partial, 0o755)
        if not folder.exists():
            partial.rename(folder)
        for child in sorted(partial.glob("*"), key=lambda p: p.name == "model_index.json"):
            child.rename(folder / child.name)  # last, what makes it a model
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def check_new(folder: Path) -> None:
    """UserError if there is something at `folder` already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists already; name a new or empty folder")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write {folder}: {there} is not a folder one may write to")


def _write(model: Model, params: Params, folder: Path) -> None:
    index: dict[str, Any] = {"_class_name": model.pipeline}
    for name, part in PARTS.items():
        projected = name == "text_encoder" and model.text_encoder.projected
        class_name = part.class_name + "WithProjection" * projected
        index[name] = [part.library, class_name]
        files.save_folder(folder / part.folder, part.stem, released(params[name]))
        data = config.dump(getattr(model, name).config, class_name)
        if part.library == "transformers":
            del data["_class_name"]
            data |= {"architectures": [class_name], "model_type": "clip_text_model"}
        config.write_json(folder / part.folder / "config.json", data)
    if model.vision:
        _write_clip(model, params, folder / "clip")
    index["tokenizer"] = ["transformers", "CLIPTokenizer"]
    model.tokenizer.save(folder / "tokenizer")
    index["scheduler"] = ["diffusers", model.scheduler["_class_name"]]
    (folder / "scheduler").mkdir()
    config.write_json(folder / "scheduler" / "scheduler_config.json", model.scheduler)
    index |= {"safety_checker": [None, None], "feature_extractor": [None, None]}
    if model.pipeline in ("StableDiffusionPipeline", "StableDiffusionInpaintPipeline"):
        index |= {"image_encoder": [None, None], "requires_safety_checker": False}
    config.write_json(folder / "model_index.json", index)


def _write_clip(model: Model, params: Params, folder: Path) -> None:
    """The text encoder again, with all that makes it transformers' CLIPModel."""
    assert model.vision
    configs = {"text_config": model.text_encoder.config, "vision_config": model.vision.config}
    data: dict[str, Any] = {"architectures": ["CLIPModel"], "model_type": "clip"}
    data |= {name: dataclasses.asdict(value) for name, value in configs.items()}
    data["projection_dim"] = model.vision.config.projection_dim
    files.save_folder(folder, "model", released({**params["text_encoder"], **params["clip"]}))
    config.write_json(folder / "config.json", data)
    model.tokenizer.save(folder)


def released(params: Params) -> Iterator[tuple[str, Callable[[], np.ndarray], int]]:
    """Keys, values and sizes of a tree as PyTorch has them."""
    for path, leaf in trees.flatten(params).items():

        def read(path: str = path, leaf: Any = leaf) -> np.ndarray:
            array = np.asarray(leaf)
            if path.endswith("/kernel"):
                array = array.transpose(rename.TO_TORCH[array.ndim])
            return array

        yield rename.to_key(path), read, leaf.nbytes

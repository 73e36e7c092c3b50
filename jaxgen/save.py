"""Model folders out: what diffusers loads."""

import dataclasses
import os
from pathlib import Path
from typing import Any

from jaxgen import config, locks
from jaxgen.denoiser import CONTROLLED, Model, control_names
from jaxgen.models.controlnet import ControlNet
from jaxgen.parts import CONTROLNET, PARTS, released
from jaxgen.types import Params, UserError
from jaxgen.weights import files

FORMAT = "0.42.1"  # the diffusers whose folders these are, which asks for it in some of them


def save(model: Model, params: Params, folder: str | Path) -> None:
    """Writes a folder that diffusers loads, all or nothing; into an empty one, the index last.

    Tensors keep their dtype. Raises UserError if `folder` exists and is not empty, or cannot be
    written.
    """
    if model.controls and model.pipeline not in CONTROLLED:
        raise UserError(f"diffusers has no {model.pipeline} with ControlNets to be saved for")
    folder = Path(folder)
    check_new(folder)
    with locks.whole(folder, "model_index.json") as scratch:
        _write(model, params, scratch)


def save_control(net: ControlNet, params: Params, folder: str | Path) -> None:
    """Writes a ControlNet alone, as `save` writes a model."""
    folder = Path(folder)
    check_new(folder)
    with locks.whole(folder, "config.json") as scratch:
        _write_control(net, params, scratch)


def check_new(folder: Path) -> None:
    """UserError if there is something at `folder` already, other than what a killed save left."""
    left = locks.unfinished(folder.resolve())
    if folder.exists() and (
        not folder.is_dir() or any(not p.name.startswith(left) for p in folder.iterdir())
    ):
        raise UserError(f"{folder} exists already; name a new or empty folder")
    there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"cannot write {folder}: {there} is not a folder one may write to")


def _write(model: Model, params: Params, folder: Path) -> None:
    pipeline = CONTROLLED[model.pipeline] if model.controls else model.pipeline
    index: dict[str, Any] = {"_class_name": pipeline, "_diffusers_version": FORMAT}
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
    for name, net in zip(control_names(len(model.controls)), model.controls):
        _write_control(net, params[name], folder / name)
        kind = "MultiControlNetModel" if len(model.controls) > 1 else CONTROLNET.class_name
        index["controlnet"] = [CONTROLNET.library, kind]
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


def _write_control(net: ControlNet, params: Params, folder: Path) -> None:
    files.save_folder(folder, CONTROLNET.stem, released(params))
    config.write_json(folder / "config.json", net.config.dump())


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

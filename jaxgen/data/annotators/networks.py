"""Hints that need networks which are not of this house: depth and its normals, HED, pose.

They run in PyTorch, where it is installed, and fetch their weights from the hub as their packages
do: only who names such an annotator asks for that.
"""

import functools
import importlib
from typing import Any

import numpy as np
from PIL import Image

from jaxgen.data.annotators import maps
from jaxgen.data.images import resize
from jaxgen.types import UserError

DEPTH = "Intel/dpt-hybrid-midas"
ANNOTATORS = "lllyasviel/Annotators"
SIDE = 384  # pixels of the shorter side, at which the released ControlNet is shown normals


def depth(picture: np.ndarray, model: str = DEPTH) -> np.ndarray:
    """Depth by MiDaS (Ranftl et al. 2021), near is bright; by transformers."""
    return maps.depth(_near(picture, model, "depth"), picture.shape[:2])


def normal(picture: np.ndarray, model: str = DEPTH) -> np.ndarray:
    """Normals of MiDaS' depth; at one size, for slopes are by the pixel."""
    height, width = picture.shape[:2]
    size = [round(side * SIDE / min(height, width)) for side in (width, height)]
    near = Image.fromarray(_near(picture, model, "normal"))
    small = np.asarray(near.resize(size, Image.Resampling.BICUBIC))
    return resize(maps.normals(small), width, height)


def _near(picture: np.ndarray, model: str, name: str) -> np.ndarray:
    """Inverse depth as the network has it, float32 [h, w], of the picture's size or its own."""
    try:
        found = _estimator(model, name)(Image.fromarray(picture))["predicted_depth"]
    except UserError:
        raise
    except Exception as error:
        raise _failed(name, error) from None
    return np.squeeze(np.asarray(found, np.float32))


def hed(picture: np.ndarray) -> np.ndarray:
    """Soft edges by HED (Xie & Tu 2015); by controlnet_aux."""
    return _by_package("HEDdetector", "hed", picture)


def pose(picture: np.ndarray) -> np.ndarray:
    """Skeletons by OpenPose (Cao et al. 2019); by controlnet_aux. `pose.py` draws known ones."""
    return _by_package("OpenposeDetector", "pose", picture)


def _by_package(detector: str, name: str, picture: np.ndarray) -> np.ndarray:
    height, width = picture.shape[:2]
    try:
        found = _detector(detector, name)(Image.fromarray(picture))
    except UserError:
        raise
    except Exception as error:
        raise _failed(name, error) from None
    return np.asarray(found.convert("RGB").resize((width, height)))


@functools.lru_cache(maxsize=1)  # pictures come by the thousand
def _estimator(model: str, name: str) -> Any:
    _package("torch", name)
    return _package("transformers", name).pipeline("depth-estimation", model=model)


@functools.lru_cache(maxsize=2)
def _detector(detector: str, name: str) -> Any:
    return getattr(_package("controlnet_aux", name), detector).from_pretrained(ANNOTATORS)


def _package(package: str, name: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(
            f"the annotator {name} needs {package}: pip install {package.replace('_', '-')}, "
            "or give a finished hint"
        ) from None


def _failed(name: str, error: Exception) -> UserError:
    """Of what other packages raise, the first line."""
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return UserError(f"the annotator {name} failed ({reason[:160]}); give a finished hint instead")

"""Who tells what images mean: the image encoder of a CLIP, the model's own or another."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from jaxgen import trees, zoo
from jaxgen.evaluation import clip
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.refs import find, is_remote
from jaxgen.seedselect.objective import ClipDistance, Score
from jaxgen.seedselect.search import Search
from jaxgen.types import Array, Params, UserError
from jaxgen.weights import files
from jaxgen.weights.files import Tensor

OWN = ("clip", "image_encoder")  # folders of a model folder that hold an image encoder


@dataclass(frozen=True)
class Judge:
    """An image encoder that tells what pictures mean, and its parameters, float32."""

    vision: VisionEncoder
    params: Params

    def fingerprint(self) -> str:
        """What tells its parameters from others, as `files.fingerprint` of those of a model."""

        def tensor(leaf: Array) -> Tensor:
            return Tensor(leaf.shape, leaf.dtype, lambda block: np.asarray(leaf[block]))

        held = {path: tensor(leaf) for path, leaf in trees.flatten(self.params).items()}
        return files.fingerprint({"judge": held})


def open_judge(ref: str | Path | None, model: str | Path | None, variant: str = "") -> Judge:
    """The judge in a folder; without one the model's own.

    Args:
        ref: a folder of a CLIP, or of its image encoder alone.
        model, variant: what the model was loaded from.

    Raises:
        UserError: for a folder that holds none, and a model without one.
    """
    if ref is None and str(model).startswith(zoo.PREFIX):
        raise UserError(f"{model} has no image encoder of its own; name a CLIP folder (judge)")
    if ref is None:
        path = find(model, variant)
        own = [path / name for name in OWN if (path / name / "config.json").is_file()]
        if not own:
            lacks = "has no image encoder of its own"
            if model is not None and is_remote(model):
                lacks = "was fetched without an image encoder"
            raise UserError(f"{model or path} {lacks}; name a CLIP folder (judge)")
        ref = own[0]
    return Judge(*clip.open_vision(ref))


def meaning_by(judge: Judge | None, how: Search) -> Score:
    """The distance in a judge's space, as a score."""
    if judge is None:
        raise UserError("images are judged by a judge or by a score: give one of them")
    return Score(ClipDistance(judge.vision, how.distance, how.contrast), judge.params)

"""Who tells what images mean: the image encoder of a CLIP, the model's own or another."""

from dataclasses import dataclass
from pathlib import Path

from jaxgen.evaluation import clip
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.refs import find
from jaxgen.seedselect.objective import ClipDistance, Score
from jaxgen.seedselect.search import Search
from jaxgen.types import Params, UserError

OWN = ("clip", "image_encoder")  # folders of a model folder that hold an image encoder


@dataclass(frozen=True)
class Judge:
    """An image encoder that tells what pictures mean, and its parameters, float32."""

    vision: VisionEncoder
    params: Params


def open_judge(ref: str | Path | None, model: str | Path | None) -> Judge:
    """The judge in a folder; without one the model's own.

    Args:
        ref: a folder of a CLIP, or of its image encoder alone.
        model: what the model was loaded from.

    Raises:
        UserError: for a folder that holds none, and a model without one.
    """
    if ref is None:
        path = find(model)
        own = [path / name for name in OWN if (path / name / "config.json").is_file()]
        if not own:
            raise UserError(f"{path} has no image encoder of its own; name a CLIP folder (judge)")
        ref = own[0]
    return Judge(*clip.open_vision(ref))


def meaning_by(judge: Judge | None, how: Search) -> Score:
    """The distance in a judge's space, as a score."""
    if judge is None:
        raise UserError("images are judged by a judge or by a score: give one of them")
    return Score(ClipDistance(judge.vision, how.distance, how.contrast), judge.params)

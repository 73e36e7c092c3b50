"""Whether pictures show what captions in the words of emoji_scenes say, by the judge."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from jaxgen.data.emoji_scenes import artwork, said
from jaxgen.evaluation import judge
from jaxgen.evaluation.judge import Seen
from jaxgen.types import Params

AXES = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}  # axis, sign
SIDES = {"left of": "left or right", "right of": "left or right"}  # the others: above or below
ALONE = "asked subjects alone"

Shares = dict[str, tuple[int, int]]  # by what was asked: how often it was right, and asked


def right(
    params: Params, images: Sequence[np.ndarray], captions: Sequence[str], progress: bool = False
) -> Shares:
    """Counts what is right in pictures uint8 [64, 64, 3], each of which has a caption.

    By what was asked: `subject, head` and so on, once for each subject that a caption names, right
    where the picture shows it; `all subjects` of a caption; `asked subjects alone`, right where the
    picture shows at least one of those and no other; `style`, right where all that is shown has it;
    `background`, its colour; `left or right` and `above or below`, right where both subjects are
    shown and the middles of their boxes lie so; the same `of two shown`, asked of pictures that
    show both. What no caption says is absent.
    """
    asked: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for seen, caption in zip(judge.look(params, images, progress), captions):
        for name, is_right in verdicts(said.read(caption), seen):
            asked[name] += 1
            found[name] += is_right
    return {name: (found[name], asked[name]) for name in sorted(asked, key=order)}


def verdicts(claim: said.Said, seen: Seen) -> list[tuple[str, bool]]:
    """What is right of what is said of one picture, by what was asked."""
    boxes = {each.subject: np.array(each.box) for each in reversed(seen.found)}  # the surest first
    shown = [(f"subject, {artwork.load().subjects[n].group}", n in boxes) for n in claim.subjects]
    if claim.subjects:
        shown.append(("all subjects", boxes.keys() >= set(claim.subjects)))
        shown.append((ALONE, bool(boxes) and boxes.keys() <= set(claim.subjects)))
    if claim.style:
        styles = {each.style for each in seen.found}
        shown.append(("style", styles == {claim.style}))
    if claim.colour:
        shown.append(("background", seen.colour == claim.colour))
    for one, relation, other in claim.relations:
        name = SIDES.get(relation, "above or below")
        both, (axis, sign) = one in boxes and other in boxes, AXES[relation]
        apart = boxes[one] - boxes[other] if both else np.zeros(4)
        lies = bool(sign * (apart[axis] + apart[axis + 2]) > 0)
        shown.append((name, lies))
        if both:
            shown.append((f"{name}, of two shown", lies))
    return shown


def order(name: str) -> tuple[int, str]:
    """By which the names of what was asked are sorted: subjects first, relations last."""
    names = [*(f"subject, {group}" for group in artwork.GROUPS), "all subjects"]
    names += [ALONE, "style", "background"]
    return (names.index(name) if name in names else len(names), name)

"""Whether pictures show what captions in the words of emoji_scenes say, by the judge."""

from collections import Counter
from collections.abc import Sequence

import numpy as np
from scipy import ndimage

from jaxgen.data.emoji_scenes import artwork, backgrounds, said
from jaxgen.evaluation import judge
from jaxgen.evaluation.judge import Seen
from jaxgen.types import Params

LEAST = 16  # cells of 32x32 that show a subject; the thinnest one at its smallest takes 22
AXES = {"left of": (1, -1), "right of": (1, 1), "above": (0, -1), "below": (0, 1)}  # axis, sign
SIDES = {"left of": "left or right", "right of": "left or right"}  # the others: above or below

Shares = dict[str, tuple[int, int]]  # by what was asked: how often it was right, and asked


def right(params: Params, images: Sequence[np.ndarray], captions: Sequence[str]) -> Shares:
    """Counts what is right in pictures uint8 [64, 64, 3], each of which has a caption.

    By what was asked: `subject, head` and so on, once for each subject that a caption names, right
    where the picture shows it; `all subjects` of a caption; `nothing else`, right where the picture
    shows no subject beside those; `style`; `background`, its colour;
    `left or right` and `above or below`, right where both subjects are shown and their centres lie
    so; the same `of two shown`, asked of pictures that show both. What no caption says is absent.
    """
    seen = judge.look(params, images)
    asked: Counter[str] = Counter()
    found: Counter[str] = Counter()
    for i, caption in enumerate(captions):
        for name, is_right in _verdicts(said.read(caption), seen, i):
            asked[name] += 1
            found[name] += is_right
    return {name: (found[name], asked[name]) for name in sorted(asked, key=_order)}


def _verdicts(claim: said.Said, seen: Seen, i: int) -> list[tuple[str, bool]]:
    cells = seen.cells[i]
    shown = _shown(cells)
    verdicts = [
        (f"subject, {artwork.load().subjects[n].group}", n in shown) for n in claim.subjects
    ]
    if claim.subjects:
        verdicts.append(("all subjects", shown.issuperset(claim.subjects)))
        verdicts.append(("nothing else", shown.issubset(claim.subjects)))
    if claim.style:
        verdicts.append(("style", artwork.STYLES[seen.style[i]] == claim.style))
    if claim.colour:
        verdicts.append(("background", list(backgrounds.COLOURS)[seen.colour[i]] == claim.colour))
    for one, relation, other in claim.relations:
        name = SIDES.get(relation, "above or below")
        both = one in shown and other in shown
        lies = both and _lies(cells, one, relation, other)
        verdicts.append((name, lies))
        if both:
            verdicts.append((f"{name}, of two shown", lies))
    return verdicts


def _shown(cells: np.ndarray) -> set[int]:
    """The subjects of cells [32, 32]: a fringe of one around another does not show it.

    A connected part of a subject's cells does that is large enough, and within whose box most of
    what is no background is of this subject.
    """
    shown = set()
    for label in np.unique(cells[cells > 0]):
        parts, _ = ndimage.label(cells == label)
        for part, box in enumerate(ndimage.find_objects(parts), 1):
            own = (parts[box] == part).sum()
            if own >= LEAST and 2 * own > (cells[box] > 0).sum():
                shown.add(int(label) - 1)
    return shown


def _lies(cells: np.ndarray, one: int, relation: str, other: int) -> bool:
    axis, sign = AXES[relation]
    a, b = (np.nonzero(cells == n + 1)[axis].mean() for n in (one, other))
    return bool(sign * (a - b) > 0)


def _order(name: str) -> tuple[int, str]:
    names = [*(f"subject, {group}" for group in artwork.GROUPS), "all subjects"]
    names += ["nothing else", "style", "background"]
    return (names.index(name) if name in names else len(names), name)

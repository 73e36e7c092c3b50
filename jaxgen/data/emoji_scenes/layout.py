"""Where the subjects of a scene stand: none covers another, and each relation is plain to see."""

from collections.abc import Sequence

import numpy as np

from jaxgen.data.emoji_scenes.backgrounds import SIDE

SIZES = {"small": (20, 24), "medium": (26, 34), "large": (36, 44)}  # pixels of the longer side
SIDES = np.arange(20, 45, 2)
ROOM = SIDE - 2  # a pixel on each side stays free
OF_THREE = SIDES[SIDES <= 34]  # none of three is longer than this
RELATIONS = (("left of", "right of"), ("above", "below"))  # along x, along y

Shape = tuple[int, int]  # width, height
Layout = tuple[tuple[int, ...], tuple[Shape, ...], tuple[str, ...]]


def size_word(side: int) -> str:
    """What a longer side of so many pixels is called."""
    return next(word for word, (least, most) in SIZES.items() if least <= side <= most)


def arrange(shapes: Sequence[Shape], rng: np.random.Generator) -> Layout:
    """Longer sides, upper left corners and relations of one to three subjects, drawn at random.

    The boxes of two subjects are apart along one axis, and their centres further apart along it
    than across: the first one is left of, right of, above or below the second. A third one lies
    apart from both, across that axis.

    Args:
        shapes: width and height of each one's artwork; only their ratio counts.
    """
    while True:
        sides = rng.choice(SIDES if len(shapes) < 3 else OF_THREE, len(shapes))
        boxes = [_scaled(shape, side) for shape, side in zip(shapes, sides.tolist())]
        if len(boxes) == 1:
            x, y = (1 + int(rng.integers(ROOM - e, endpoint=True)) for e in boxes[0])
            return (int(sides[0]),), ((x, y),), ()
        axis = int(rng.integers(2))
        found = _place(boxes, axis, rng)
        if found is not None:
            corners, relations = found
            return tuple(sides.tolist()), corners, relations


def _scaled(shape: Shape, side: int) -> Shape:
    scale = side / max(shape)
    return max(1, round(shape[0] * scale)), max(1, round(shape[1] * scale))


def _place(
    boxes: list[Shape], axis: int, rng: np.random.Generator
) -> tuple[tuple[Shape, ...], tuple[str, ...]] | None:
    """Corners and relations along an axis, or None where there is no room."""
    across = 1 - axis
    pair, others = boxes[:2], boxes[2:]
    band = max(extent[across] for extent in pair)
    if sum(extent[axis] for extent in pair) > ROOM:
        return None
    if sum(extent[across] for extent in others) + band > ROOM:
        return None

    swapped = rng.random() < 0.5  # the first one comes second along the axis
    along = _spread([extent[axis] for extent in (pair[::-1] if swapped else pair)], rng)
    along = along[::-1] if swapped else along
    relations = [RELATIONS[axis][int(swapped)]]
    start, room = 1, ROOM
    if others:
        after = rng.random() < 0.5
        tall = others[0][across]
        places = _spread([band, tall] if after else [tall, band], rng)
        start, third = places if after else places[::-1]
        room = band
        relations.append(RELATIONS[across][int(after)])
    beside = [start + int(rng.integers(room - e[across], endpoint=True)) for e in pair]

    if _apart(along, pair, axis) < _apart(beside, pair, across):
        return None
    if others:
        along.append(1 + int(rng.integers(ROOM - others[0][axis], endpoint=True)))
        beside.append(third)
    corners = zip(along, beside) if axis == 0 else zip(beside, along)
    return tuple(corners), tuple(relations)


def _spread(extents: list[int], rng: np.random.Generator) -> list[int]:
    """Where two things start that stand apart in a row, the free room drawn at random."""
    free = np.sort(rng.integers(ROOM - sum(extents), size=2, endpoint=True)).tolist()
    return [1 + free[0], 1 + free[1] + extents[0]]


def _apart(starts: list[int], pair: list[Shape], axis: int) -> float:
    """How far apart the centres of two boxes are along an axis."""
    first, second = (start + extent[axis] / 2 for start, extent in zip(starts, pair))
    return abs(first - second)

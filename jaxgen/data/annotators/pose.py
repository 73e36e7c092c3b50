"""Skeletons, as OpenPose draws them and the released ControlNet reads them."""

import colorsys

import numpy as np

from jaxgen.data.annotators.lines import opencv
from jaxgen.types import UserError

# COCO's 18 keypoints as OpenPose numbers them: nose, neck, right shoulder, elbow and wrist, the
# left ones, right hip, knee and ankle, the left ones, eyes and ears, the right one first.
POINTS = 18
LIMBS = (
    (1, 2), (1, 5), (2, 3), (3, 4), (5, 6), (6, 7), (1, 8), (8, 9), (9, 10),
    (1, 11), (11, 12), (12, 13), (1, 0), (0, 14), (14, 16), (0, 15), (15, 17),
)  # fmt: skip
COLOURS = [
    tuple(round(255 * c) for c in colorsys.hsv_to_rgb(i / POINTS, 1, 1)) for i in range(POINTS)
]


def draw(people: np.ndarray, width: int, height: int) -> np.ndarray:
    """Keypoints [P, 18, 2], x and y as fractions, -1 or NaN where unseen -> uint8 [H, W, 3].

    Raises:
        UserError: for another shape.
    """
    people = np.asarray(people, np.float64)
    if people.ndim != 3 or people.shape[1:] != (POINTS, 2):
        raise UserError(f"keypoints are {list(people.shape)}, and must be [people, {POINTS}, 2]")
    cv2, drawn = opencv(), np.zeros((height, width, 3), np.uint8)
    seen = np.asarray((people >= 0).all(-1))  # NaN is not
    pixels = np.where(seen[..., None], people, 0) * (width, height)
    for person, there in zip(pixels, seen):
        for colour, (a, b) in zip(COLOURS, LIMBS):
            if there[a] and there[b]:
                middle, length = (person[a] + person[b]) / 2, np.linalg.norm(person[a] - person[b])
                angle = np.degrees(np.arctan2(*(person[b] - person[a])[::-1]))
                centre = tuple(int(v) for v in middle)
                limb = cv2.ellipse2Poly(centre, (int(length / 2), 4), int(angle), 0, 360, 1)
                cv2.fillConvexPoly(drawn, limb, colour)
    drawn = (drawn * 0.6).astype(np.uint8)
    for person, there in zip(pixels, seen):
        for colour, point, visible in zip(COLOURS, person, there):
            if visible:
                cv2.circle(drawn, tuple(int(v) for v in point), 4, colour, thickness=-1)
    return drawn

"""Putting a sprite on a picture, and what is read off it: its box, edges, a hint."""

import numpy as np

VISIBLE = 128  # alpha from which a pixel belongs to a subject
EDGE = 32  # levels of 255 by which colours beside an edge differ


def composite(picture: np.ndarray, sprite: np.ndarray) -> np.ndarray:
    """Draws a premultiplied sprite, uint8 [h, w, 4], over a part of a picture, in place.

    Returns:
        Which pixels it makes its own, bool [h, w].
    """
    alpha = sprite[..., 3:]
    below = picture * (255 - alpha).astype(np.uint16) + 127
    picture[...] = sprite[..., :3] + (below // 255).astype(np.uint8)
    return alpha[..., 0] >= VISIBLE


def box(visible: np.ndarray, x: int, y: int) -> tuple[int, int, int, int]:
    """The box in pixels, x0, y0, x1, y1, of what is visible in a window at (x, y)."""
    rows = np.flatnonzero(visible.any(1))
    columns = np.flatnonzero(visible.any(0))
    return x + int(columns[0]), y + int(rows[0]), x + int(columns[-1]) + 1, y + int(rows[-1]) + 1


def edges(picture: np.ndarray) -> np.ndarray:
    """Thin edges of a picture, uint8 [H, W], 0 or 255: the gradient where it is at its highest.

    As Canny's, without smoothing, which leaves nothing of sprites this small, and with one
    threshold.
    """
    colours = picture.transpose(2, 0, 1).astype(np.int16)
    dx, dy = np.zeros((2, *picture.shape[:2]), np.int16)
    for colour in colours:  # faster than a maximum over an axis of three
        np.maximum(dx[:, 1:-1], np.abs(colour[:, 2:] - colour[:, :-2]), out=dx[:, 1:-1])
        np.maximum(dy[1:-1], np.abs(colour[2:] - colour[:-2]), out=dy[1:-1])
    slope = np.maximum(dx, dy)

    crest = np.zeros(slope.shape, bool)
    across = (slope[:, 1:-1] > slope[:, :-2]) & (slope[:, 1:-1] >= slope[:, 2:])
    down = (slope[1:-1] > slope[:-2]) & (slope[1:-1] >= slope[2:])
    steeper = dx >= dy
    crest[:, 1:-1] = across & steeper[:, 1:-1]
    crest[1:-1] |= down & ~steeper[1:-1]
    return np.where(crest & (slope >= EDGE), np.uint8(255), np.uint8(0))


def as_hint(flat: np.ndarray) -> np.ndarray:
    """[H, W] -> [H, W, 3], as hints are."""
    return np.repeat(flat[..., None], 3, axis=2)

"""Hints of lines: edges, line segments, soft edges, scribbles."""

from typing import Any

import numpy as np

from jaxgen.types import UserError


def opencv() -> Any:
    """OpenCV, which only annotators need. UserError where it is not installed."""
    try:
        import cv2
    except ImportError:
        raise UserError(
            "annotators need OpenCV: pip install 'jaxgen[annotators]', or give a finished hint"
        ) from None
    return cv2


def canny(picture: np.ndarray, low: float = 100, high: float = 200) -> np.ndarray:
    """Canny's edges, by OpenCV, with the thresholds that the released ControlNet is shown with."""
    return _as_hint(opencv().Canny(np.ascontiguousarray(picture), low, high))


def hough(picture: np.ndarray, shortest: float = 0.05) -> np.ndarray:
    """Straight lines, a pixel wide: LSD's segments (Grompone von Gioi et al. 2010), by OpenCV.

    In the stead of the network (M-LSD) that made the data of the released ControlNet.

    Args:
        shortest: length of a segment that is kept, as a share of the picture's longer side.
    """
    cv2 = opencv()
    found = cv2.createLineSegmentDetector().detect(_grey(picture))[0]
    drawn = np.zeros(picture.shape[:2], np.uint8)
    for x0, y0, x1, y1 in () if found is None else found.reshape(-1, 4):
        if np.hypot(x1 - x0, y1 - y0) >= shortest * max(picture.shape[:2]):
            ends = [tuple(round(float(v)) for v in end) for end in ((x0, y0), (x1, y1))]
            cv2.line(drawn, *ends, 255)
    return _as_hint(drawn)


def soft(picture: np.ndarray, sigma: float = 1.0) -> np.ndarray:
    """Soft edges without a network: how steep colours are, smoothed; the steepest are white.

    In the stead of HED (`hed`, which needs its network): finer, and blind to meaning.
    """
    cv2 = opencv()
    smooth = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), sigma)
    dx, dy = (cv2.Scharr(smooth, cv2.CV_32F, *axis) for axis in ((1, 0), (0, 1)))
    slope = np.hypot(dx, dy).reshape(*picture.shape[:2], -1).max(-1)
    if not slope.any():  # one colour
        return np.zeros_like(picture)
    top = np.percentile(slope, 99.5) or slope.max()  # of a small thing, the steepest
    return _as_hint(np.clip(slope / top * 255, 0, 255).round().astype(np.uint8))


def scribble(picture: np.ndarray, sigma: float = 3.0, threshold: int = 80) -> np.ndarray:
    """Thick strokes, as if drawn by hand: the crests of soft edges, widened."""
    cv2 = opencv()
    edges = cv2.GaussianBlur(soft(picture)[..., 0].astype(np.float32), (0, 0), sigma / 3)
    crest = np.zeros(edges.shape, bool)
    for line in _lines_through_the_middle():
        crest |= cv2.dilate(edges, line) == edges
    thin = np.where(crest & (edges > threshold), np.uint8(255), np.uint8(0))
    return _as_hint(np.where(cv2.GaussianBlur(thin, (0, 0), sigma) > 4, 255, 0).astype(np.uint8))


def _lines_through_the_middle() -> list[np.ndarray]:
    """Masks [3, 3] of the four directions."""
    level, falling = np.zeros((3, 3), np.uint8), np.eye(3, dtype=np.uint8)
    level[1] = 1
    return [level, level.T.copy(), falling, np.ascontiguousarray(falling[::-1])]


def _grey(picture: np.ndarray) -> np.ndarray:
    cv2 = opencv()
    return cv2.cvtColor(np.ascontiguousarray(picture), cv2.COLOR_RGB2GRAY)


def _as_hint(flat: np.ndarray) -> np.ndarray:
    return np.repeat(flat[..., None], 3, axis=2)

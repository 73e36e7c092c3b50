"""Whether pictures follow the hints that they were made from."""

from collections.abc import Iterable, Sequence

import numpy as np
from scipy import ndimage

from jaxgen.evaluation.judge import CELLS, Seen


def edge_f1(found: np.ndarray, wanted: np.ndarray, tolerance: int = 1) -> float:
    """How well edges agree, bool [H, W] each: the harmonic mean of precision and recall, 0 to 1.

    An edge counts as right where the other picture has one at most `tolerance` pixels away, also
    diagonally. Where neither has any, they agree.
    """
    if not found.any() and not wanted.any():
        return 1.0
    if not found.any() or not wanted.any():
        return 0.0
    near = np.ones((2 * tolerance + 1,) * 2, bool)
    precision = ndimage.binary_dilation(wanted, near)[found].mean()
    recall = ndimage.binary_dilation(found, near)[wanted].mean()
    total = precision + recall
    return float(2 * precision * recall / total) if total else 0.0


def labels(seen: Seen) -> np.ndarray:
    """What the judge sees in a picture, as labels [32, 32]: 0, or 1 + the number of a subject."""
    found = np.zeros((CELLS, CELLS), np.int32)
    for each in seen.found:
        found[each.cells] = each.subject + 1
    return found


def cells(segmentation: np.ndarray) -> np.ndarray:
    """A scene's labels [64, 64] at the judge's cells [32, 32]: the most frequent of four pixels.

    Of equally frequent ones the largest counts, so that an edge's cell is a subject's.
    """
    h, w = segmentation.shape
    fours = segmentation.reshape(h // 2, 2, w // 2, 2).transpose(0, 2, 1, 3).reshape(-1, 4)
    times = (fours[:, :, None] == fours[:, None]).sum(-1)
    best = (times * (1 << 16) + fours).argmax(-1)
    return fours[np.arange(len(fours)), best].reshape(h // 2, w // 2)


def mean_iou(found: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Mean intersection over union of labels, 0 to 1, over all classes that are wanted anywhere.

    Each class' pixels are counted over all pictures, as benchmarks of segmentation do.
    """
    size = 1 + max(_largest(found), _largest(wanted))
    both, either = np.zeros(size), np.zeros(size)
    for f, w in zip(found, wanted, strict=True):
        hits = np.bincount(w[f == w].ravel(), minlength=size)
        both += hits
        either += np.bincount(f.ravel(), minlength=size) + np.bincount(w.ravel(), minlength=size)
        either -= hits
    asked = np.bincount(np.concatenate([w.ravel() for w in wanted]), minlength=size) > 0
    return float((both[asked] / either[asked]).mean())


def _largest(maps: Iterable[np.ndarray]) -> int:
    return max(int(one.max()) for one in maps)

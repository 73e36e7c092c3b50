"""Annotators: what makes the hint of a ControlNet from a picture.

Those of photos take uint8 [H, W, 3] and give uint8 [H, W, 3], white on black where it is of lines,
as the released ControlNets learned to read it. Others read a file, whose numbers are labels or
depth. `pose.py` draws keypoints that are known already.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from jaxgen.data.annotators import files, lines, networks

Annotator = Callable[[np.ndarray], np.ndarray]

ANNOTATORS: Mapping[str, Annotator] = {
    "canny": lines.canny,
    "hough": lines.hough,
    "soft": lines.soft,
    "scribble": lines.scribble,
    "depth": networks.depth,
    "normal": networks.normal,
    "hed": networks.hed,
    "pose": networks.pose,
}
# Of these, `normal` tells photos from pictures of depth.
OF_FILES: Mapping[str, Callable[[Path], np.ndarray]] = {
    "labels": files.labels,
    "distinct": files.distinct,
    "normal": files.normal,
}
NAMES = tuple(dict.fromkeys((*ANNOTATORS, *OF_FILES)))

"""Annotators: what makes the hint of a ControlNet from a picture.

Each takes uint8 [H, W, 3] and gives uint8 [H, W, 3], white on black where it is of lines, as the
released ControlNets learned to read it. `maps.py` and `pose.py` draw what is known already: labels,
depth, keypoints.
"""

from collections.abc import Callable, Mapping

import numpy as np

from jaxgen.data.annotators import lines, networks

Annotator = Callable[[np.ndarray], np.ndarray]

ANNOTATORS: Mapping[str, Annotator] = {
    "canny": lines.canny,
    "hough": lines.hough,
    "soft": lines.soft,
    "scribble": lines.scribble,
    "depth": networks.depth,
    "hed": networks.hed,
    "pose": networks.pose,
}

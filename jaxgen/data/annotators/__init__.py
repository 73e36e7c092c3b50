"""Annotators: what makes the hint of a ControlNet from a picture.

Each takes uint8 [H, W, 3] and gives uint8 [H, W, 3], white on black where it is of lines, as the
released ControlNets learned to read it. `labels` colours a map of ADE20K's labels as its files are,
and `normal` reads a picture of depth. `pose.py` draws keypoints that are known already.
"""

from collections.abc import Callable, Mapping

import numpy as np

from jaxgen.data.annotators import lines, maps, networks

Annotator = Callable[[np.ndarray], np.ndarray]

ANNOTATORS: Mapping[str, Annotator] = {
    "canny": lines.canny,
    "hough": lines.hough,
    "soft": lines.soft,
    "scribble": lines.scribble,
    "labels": lambda picture: maps.segmentation(picture[..., 0].astype(int), maps.ADE20K_FILES),
    "normal": lambda picture: maps.normals(picture.mean(-1)),
    "depth": networks.depth,
    "hed": networks.hed,
    "pose": networks.pose,
}

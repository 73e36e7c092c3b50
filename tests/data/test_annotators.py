"""Hints from pictures whose lines, slopes and labels are known."""

import builtins

import numpy as np
import pytest

from jaxgen.data.annotators import ANNOTATORS, maps, networks, pose
from jaxgen.data.hints import fit, is_labels
from jaxgen.types import UserError


def square(side=96, low=24, high=72, band=6):
    """A white square on black, and the band of a few pixels about its sides."""
    picture = np.zeros((side, side, 3), np.uint8)
    picture[low:high, low:high] = 255
    near = np.zeros((side, side), bool)
    near[low - band : high + band, low - band : high + band] = True
    near[low + band : high - band, low + band : high - band] = False
    return picture, near


@pytest.mark.parametrize("name", ["canny", "hough", "soft", "scribble"])
def test_lines_are_where_the_colours_change(name):
    picture, near = square(band=10 if name == "scribble" else 6)  # strokes are thick
    hint = ANNOTATORS[name](picture)
    assert hint.shape == picture.shape
    assert hint.dtype == np.uint8
    assert (hint == hint[..., :1]).all()
    drawn = hint[..., 0] > 127
    assert not drawn[~near].any()
    for rows in (drawn, drawn.T):  # every line across the square's middle meets both its sides
        assert (rows[30:66].sum(1) >= 2).all()
    assert not ANNOTATORS[name](np.full_like(picture, 77)).any()


def test_canny_is_a_pixel_wide_and_its_thresholds_count():
    ramp = np.repeat(np.linspace(0, 255, 96).astype(np.uint8)[None, :, None], 96, 0).repeat(3, 2)
    ramp[:, 48:] = np.minimum(ramp[:, 48:].astype(int) + 30, 255)
    assert not ANNOTATORS["canny"](ramp).any()  # a step of 30 is four times less than 100 needs
    steep = np.where(np.arange(96)[None, :, None] < 48, 0, 255).astype(np.uint8)
    steep = np.broadcast_to(steep, (96, 96, 3))
    assert ((ANNOTATORS["canny"](steep)[4:-4, :, 0] > 0).sum(1) == 1).all()


def test_colour_changes_of_equal_brightness_are_lines_too():
    picture = np.zeros((64, 64, 3), np.uint8)
    picture[:, :32], picture[:, 32:] = (200, 0, 0), (0, 102, 0)  # one grey
    assert ANNOTATORS["canny"](picture).any()
    assert ANNOTATORS["soft"](picture)[10:-10, 30:34].max() == 255


@pytest.mark.parametrize("name", ["canny", "soft", "scribble"])
def test_small_things_have_lines_too(name):
    picture = np.full((512, 512, 3), 255, np.uint8)
    picture[250:266, 250:266] = 0
    assert ANNOTATORS[name](picture)[240:276, 240:276].max() == 255


def plane(across=0.5, down=0.25, side=64):
    """Depth that rises evenly, and as a colour the normal of it: Sobel makes 8 of each step."""
    y, x = np.mgrid[:side, :side].astype(np.float32)
    normal = np.array([8 * across, 8 * down, 2 * np.pi])
    return across * x + down * y, 127.5 + 127.5 * normal / np.linalg.norm(normal)


def test_normals_of_a_slope():
    """Of depth as it is, whose steps mean something, or scaled to a range that does."""
    near, colour = plane()
    for depth, relief in ((near, None), (near + 900, None), (near / 7 - 1, near.max())):
        found = maps.normals(depth, relief=relief)
        assert np.abs(found[20:40, 20:40] - colour).max() <= 1
        assert np.abs(found[2, 2].astype(int) - (127, 127, 255)).max() <= 1  # far: it faces us
    steep, _ = plane(500, 0)
    assert np.abs(maps.normals(steep)[30, 30].astype(int) - (255, 127, 127)).max() <= 1
    assert np.abs(maps.normals(np.full((8, 8), 3.0)).astype(int) - (127, 127, 255)).max() <= 1


@pytest.mark.parametrize("of", [96, 384], ids=["the network's size", "the picture's size"])
def test_normals_of_a_photo_are_of_the_networks_depth(of, monkeypatch):
    """Which is brought to the size that slopes are measured at, whatever the photo's."""
    near, colour = plane(side=384)
    near = maps.Image.fromarray(near).resize((of, of), maps.Image.Resampling.BILINEAR)
    answer = {"predicted_depth": np.asarray(near)[None]}
    monkeypatch.setattr(networks, "_estimator", lambda model, name: lambda picture: answer)
    found = ANNOTATORS["normal"](np.zeros((768, 768, 3), np.uint8))
    assert found.shape == (768, 768, 3)
    assert np.abs(found[300:500, 300:500] - colour).max() <= 2


def test_depth_is_scaled_and_resized():
    found = maps.depth(np.array([[2.0, 4.0], [6.0, 10.0]], np.float32))
    assert found[..., 0].tolist() == [[0, 64], [128, 255]]
    assert maps.depth(np.ones((4, 4), np.float32), (8, 6)).shape == (8, 6, 3)


def test_labels_have_the_palettes_colours_and_no_others():
    labels = np.array([[0, 1, 149], [150, 255, -1]])
    found = maps.segmentation(labels)
    assert found[0].tolist() == [[120, 120, 120], [180, 120, 120], [92, 0, 255]]
    assert not found[1].any()
    assert len(np.unique(maps.ADE20K, axis=0)) == 149  # two of the 150 share one
    files = maps.segmentation(labels + 1, maps.ADE20K_FILES)
    np.testing.assert_array_equal(files[0], found[0])
    assert not maps.segmentation(np.zeros((1, 1), int), maps.ADE20K_FILES).any()
    colours = maps.distinct(256).astype(int)
    apart = np.linalg.norm(colours[:, None] - colours[None], axis=-1)
    assert (apart + 1000 * np.eye(256)).min() > 40
    assert not colours[0].any()
    with pytest.raises(UserError, match="not whole numbers"):
        maps.segmentation(np.ones((2, 2)))


def test_maps_of_labels_are_resized_to_the_nearest_and_drawings_smoothly():
    labels = maps.segmentation(np.random.default_rng(0).integers(0, 150, (10, 12)))
    assert is_labels(labels)
    resized = fit(labels, 30, 17)
    known = {tuple(c) for c in labels.reshape(-1, 3).tolist()}
    assert {tuple(c) for c in resized.reshape(-1, 3).tolist()} <= known
    drawing, _ = square()
    assert not is_labels(drawing)
    greys = maps.ADE20K_FILES[np.random.default_rng(0).choice([0, 1, 7, 9], (10, 12))]
    assert is_labels(greys)
    assert set(fit(greys, 30, 17).ravel().tolist()) <= set(greys.ravel().tolist())
    assert not is_labels(np.arange(9, dtype=np.uint8)[None, :, None].repeat(3, 2))
    assert len(np.unique(fit(drawing, 50, 50))) > 2
    assert fit(drawing, 96, 96) is drawing
    assert fit(drawing, 96, 96, 1).shape == (96, 96, 1)
    with pytest.raises(UserError, match="hints of 5 channels"):
        fit(drawing, 96, 96, 5)


def test_a_skeleton_is_drawn_in_openposes_colours():
    people = np.full((1, 18, 2), -1.0)
    people[0, 1], people[0, 8] = (0.5, 0.25), (0.5, 0.75)  # neck and right hip
    drawn = pose.draw(people, 100, 200)
    limb = pose.LIMBS.index((1, 8))
    np.testing.assert_array_equal(drawn[100, 50], (np.array(pose.COLOURS[limb]) * 0.6).astype(int))
    np.testing.assert_array_equal(drawn[50, 50], pose.COLOURS[1])
    assert pose.COLOURS[:3] == [(255, 0, 0), (255, 85, 0), (255, 170, 0)]
    assert not drawn[:, :20].any()
    with pytest.raises(UserError, match=r"must be \[people, 18, 2\]"):
        pose.draw(people[0], 10, 10)


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("canny", "cv2"),
        ("depth", "transformers"),
        ("normal", "transformers"),
        ("hed", "controlnet_aux"),
        ("pose", "controlnet_aux"),
    ],
)
def test_a_package_that_is_not_there_is_named(name, package, monkeypatch):
    real = builtins.__import__

    def absent(wanted, *args, **kwargs):
        if wanted.split(".")[0] == package:
            raise ImportError(wanted)
        return real(wanted, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    monkeypatch.setattr("importlib.import_module", absent)
    with pytest.raises(UserError, match="pip install") as caught:
        ANNOTATORS[name](square()[0])
    assert "\n" not in str(caught.value)

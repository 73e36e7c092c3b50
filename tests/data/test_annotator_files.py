"""Hints of files whose numbers count: labels and depth, in the forms that people store."""

import numpy as np
import pytest
from PIL import Image

from jaxgen.data import examples, hints
from jaxgen.data.annotators import OF_FILES
from jaxgen.data.annotators.networks import SIDE
from jaxgen.tasks.controlnet import PALETTES
from jaxgen.types import UserError
from tests.data.test_annotators import plane

LABELS = np.random.default_rng(0).integers(0, 151, (12, 16), np.uint8)


def stored(path, kind, labels=LABELS):
    """A file of labels as grey, as places of a palette of other colours, or of 16 bits."""
    if kind == "16 bits":
        image = Image.fromarray(labels.astype(np.uint16))
    else:
        image = Image.fromarray(labels)
    if kind == "palette":
        image.putpalette(np.random.default_rng(1).integers(0, 256, 768, np.uint8).tobytes())
    image.save(path)
    return path


@pytest.mark.parametrize("kind", ["grey", "palette", "16 bits"])
def test_labels_are_read_as_stored_and_coloured_as_training_does(kind, tmp_path):
    file = stored(tmp_path / "labels.png", kind)
    np.testing.assert_array_equal(examples.decode(file, "segmentation", ""), LABELS)
    for name, palette in (("labels", "ade20k"), ("distinct", "distinct")):
        np.testing.assert_array_equal(OF_FILES[name](file), PALETTES[palette][LABELS])


def test_what_are_no_labels_is_refused(tmp_path):
    photo, high, huge = (tmp_path / name for name in ("photo.png", "high.png", "huge.png"))
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(photo)
    stored(high, "grey", LABELS + 1)
    stored(huge, "16 bits", LABELS.astype(np.uint16) + 256)
    for name, file, words in (
        ("labels", photo, "holds colours, not the numbers of labels"),
        ("labels", high, "labels from 1 to 151, and not the 0 to 150 of ADE20K's files; distinct"),
        ("distinct", huge, "labels from 256 to 406, and not the 0 to 255 that have a colour"),
        ("distinct", tmp_path / "gone.png", "gone.png: no such file"),
    ):
        with pytest.raises(UserError, match=words) as caught:
            OF_FILES[name](file)
        assert str(file) in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("bits", [8, 16])
def test_normals_of_a_picture_of_depth(bits, tmp_path, caplog):
    """Its range counts for that of 8 bits: a slope is the same with twice as many."""
    near, _ = plane(2, 1, side=86)  # 0 to 255
    _, colour = plane(2 * 86 / SIDE, 86 / SIDE, side=86)  # slopes are those at one size
    assert near.max() == 255
    deep = near.astype(np.uint8) if bits == 8 else (257 * near).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "depth.png")
    found = OF_FILES["normal"](tmp_path / "depth.png")
    assert np.abs(found[40:60, 40:60] - colour).max() <= 1
    assert "is grey, and is taken for depth" in caplog.text


def test_normals_of_fine_depth_are_smooth(tmp_path):
    """16 bits tell slopes that 8 bits make steps of."""
    near, _ = plane(0.6, 1.2, side=64)
    _, colour = plane(0.6 * 64 / SIDE, 1.2 * 64 / SIDE, side=64)
    near += 100
    near[0, 0], near[-1, -1] = 0, 255  # a range of which the slope is little
    deep = np.round(257 * near).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "depth.png")
    found = OF_FILES["normal"](tmp_path / "depth.png")
    assert np.abs(found[20:40, 20:40] - colour).max() <= 1


def test_normals_do_not_depend_on_the_size_of_the_file(tmp_path):
    y, x = np.mgrid[:96, :96] / 95
    near = Image.fromarray((40000 * np.exp(-8 * ((x - 0.5) ** 2 + (y - 0.4) ** 2))).astype("i4"))
    found = []
    for side in (96, 288):
        near.resize((side, side), Image.Resampling.BICUBIC).convert("I;16").save(tmp_path / "a.png")
        shown = Image.fromarray(OF_FILES["normal"](tmp_path / "a.png")).resize((96, 96))
        found.append(np.asarray(shown).astype(int))
    off = np.abs(found[0] - found[1])[4:-4, 4:-4]
    assert off.mean() <= 0.5  # by slopes of the file's own pixels 15,
    assert off.max() <= 8  # and 67 at most
    assert np.ptp(found[0][4:-4, 4:-4]) > 60


def test_labels_in_a_jpeg_are_refused(tmp_path):
    Image.fromarray(LABELS).save(tmp_path / "labels.jpg")
    with pytest.raises(UserError, match="a JPEG blurs the numbers of labels"):
        OF_FILES["labels"](tmp_path / "labels.jpg")
    with pytest.raises(examples.BadExample, match="is a JPEG, which blurs"):
        examples.decode(tmp_path / "labels.jpg", "segmentation", "")


def test_lines_on_what_is_transparent_stay_on_black(tmp_path):
    lines = np.zeros((8, 8, 4), np.uint8)
    lines[2:4] = 255
    Image.fromarray(lines).save(tmp_path / "lines.png")
    for hint in (
        hints.read(str(tmp_path / "lines.png")).picture,
        examples.decode(tmp_path / "lines.png", "hint", ""),
    ):
        np.testing.assert_array_equal(hint, lines[..., :3])
    assert examples.decode(tmp_path / "lines.png", "image", "").min() == 255


def test_normals_of_a_photo_go_through_the_network(tmp_path, monkeypatch):
    seen = []
    network = lambda picture: seen.append(picture) or picture  # noqa: E731
    monkeypatch.setattr("jaxgen.data.annotators.networks.normal", network)
    photo = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    Image.fromarray(photo).save(tmp_path / "photo.png")
    OF_FILES["normal"](tmp_path / "photo.png")
    np.testing.assert_array_equal(seen[0], photo)


def test_a_strip_is_no_picture_of_depth(tmp_path):
    Image.fromarray(np.zeros((1, 5000), np.uint8)).save(tmp_path / "strip.png")
    with pytest.raises(UserError, match="is a strip of 5000x1"):
        OF_FILES["normal"](tmp_path / "strip.png")

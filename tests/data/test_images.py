import json
import logging
import os
import re
import zlib

import numpy as np
import pytest
from diffusers.image_processor import VaeImageProcessor
from PIL import Image

from jaxgen.data import images
from jaxgen.types import UserError


@pytest.fixture
def rgb():
    return np.random.default_rng(0).integers(0, 256, (6, 9, 3), np.uint8)


def write(path, array, mode=None, **options):
    image = Image.fromarray(np.asarray(array))
    (image.convert(mode) if mode else image).save(path, **options)
    return path


@pytest.mark.parametrize("suffix", ["png", "bmp", "tiff", "ppm", "webp"])
def test_lossless_pictures_are_read_exactly(tmp_path, rgb, suffix):
    options = {"lossless": True} if suffix == "webp" else {}
    actual = images.read_image(write(tmp_path / f"x.{suffix}", rgb, **options))
    assert actual.dtype == np.uint8
    np.testing.assert_array_equal(actual, rgb)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK"])
def test_other_modes_are_read_as_pillow_converts_them(tmp_path, rgb, mode):
    path = write(tmp_path / "x.tiff", rgb, mode)
    np.testing.assert_array_equal(images.read_image(path), Image.open(path).convert("RGB"))


@pytest.mark.parametrize("suffix", ["png", "tiff", "pgm"])
def test_sixteen_bits_are_rounded_to_eight(tmp_path, suffix):
    deep = np.array([[0, 128, 129, 257], [32767, 32896, 65406, 65535]], np.uint16)
    path = write(tmp_path / f"x.{suffix}", deep)
    grey = np.array([[0, 0, 1, 1], [127, 128, 254, 255]])
    np.testing.assert_array_equal(images.read_image(path), np.stack([grey] * 3, axis=2))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_stand_as_their_exif_says(tmp_path, rgb, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = write(tmp_path / "x.png", rgb, exif=exif)
    expected = {  # row 0 of the file is the top, the right ..., by the standard's table
        1: rgb,
        2: rgb[:, ::-1],
        3: rgb[::-1, ::-1],
        4: rgb[::-1],
        5: rgb.transpose(1, 0, 2),
        6: np.rot90(rgb, -1),
        7: rgb[::-1, ::-1].transpose(1, 0, 2),
        8: np.rot90(rgb, 1),
    }[orientation]
    np.testing.assert_array_equal(images.read_image(path), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparent_pictures_are_composited_on_white_which_is_said_once(
    tmp_path, rgb, mode, caplog
):
    images.warn_once.cache_clear()
    alpha = np.array([0, 255, 0, 255, 0, 255, 0, 255, 128], np.uint8) * np.ones((6, 1), np.uint8)
    grey = np.stack([rgb[..., 0]] * 3, axis=2)
    if mode == "P":
        palette = Image.fromarray(grey[..., 0]).convert("P")
        palette.save(tmp_path / "x.png", transparency=int(grey[0, 0, 0]))
        expected = np.where(grey == grey[0, 0, 0], 255, grey)
    else:
        colours = rgb if mode == "RGBA" else grey
        rgba = Image.fromarray(np.dstack([colours, alpha]))
        rgba.convert(mode).save(tmp_path / "x.png")
        part = alpha[..., None] / 255
        expected = colours * part + 255 * (1 - part)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            actual = images.read_image(tmp_path / "x.png")
    np.testing.assert_allclose(actual, expected, atol=0.51)
    assert [record.message for record in caplog.records] == [
        "transparent pictures are composited on white"
    ]


def test_opaque_pictures_with_an_alpha_channel_are_read_in_silence(tmp_path, rgb, caplog):
    images.warn_once.cache_clear()
    path = write(tmp_path / "x.png", rgb, "RGBA")
    np.testing.assert_array_equal(images.read_image(path), rgb)
    assert not caplog.records


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tiff", "gif"])
def test_truncated_pictures_are_refused(tmp_path, suffix):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    path = write(tmp_path / f"x.{suffix}", noise)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=re.escape(str(path))) as caught:
        images.read_image(path)
    assert "\n" not in str(caught.value)


def test_what_is_no_picture_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        images.read_image(tmp_path / "absent.png")
    with pytest.raises(UserError, match="no such file"):
        images.read_image(tmp_path)
    (tmp_path / "x.png").write_bytes(b"")
    with pytest.raises(UserError, match="is none of PNG"):
        images.read_image(tmp_path / "x.png")
    (tmp_path / "x.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
    with pytest.raises(UserError, match="is none of PNG"):
        images.read_image(tmp_path / "x.eps")
    with pytest.raises(UserError, match="floating-point"):
        images.read_image(write(tmp_path / "x.tiff", np.zeros((2, 2), np.float32)))


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((8001, 8000), "8001x8000 = 64008000 pixels, and the limit is 64000000"),
        ((10_000, 10_000), "10000x10000 = 100000000 pixels, and the limit is 64000000"),
        ((60_000, 60_000), r"over \d+ pixels, and the limit is 64000000"),
    ],
)
@pytest.mark.filterwarnings("error")
def test_decompression_bombs_are_refused_by_their_header(tmp_path, size, message):
    # A PNG of one pixel whose header claims more: nothing but the header may be believed or read.
    write(tmp_path / "small.png", np.zeros((1, 1, 3), np.uint8))
    data = bytearray((tmp_path / "small.png").read_bytes())
    data[16:24] = size[0].to_bytes(4, "big") + size[1].to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(data)
    before = Image.MAX_IMAGE_PIXELS
    with pytest.raises(UserError, match=message):
        images.read_image(tmp_path / "bomb.png")
    assert before == Image.MAX_IMAGE_PIXELS


def test_masks_are_true_where_they_are_white(tmp_path):
    grey = np.array([[0, 127, 128, 255]], np.uint8)
    clear = np.full((1, 2, 4), 255, np.uint8)
    clear[0, 1, 3] = 0  # white, but nothing is drawn there
    drawn = images.read_mask(write(tmp_path / "z.png", clear))
    np.testing.assert_array_equal(drawn, [[True, False]])
    mask = images.read_mask(write(tmp_path / "x.png", grey))
    assert mask.dtype == bool
    np.testing.assert_array_equal(mask, [[False, False, True, True]])
    colours = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]]], np.uint8)  # luma 76, 150, 29
    np.testing.assert_array_equal(
        images.read_mask(write(tmp_path / "y.png", colours)), [[False, True, False]]
    )


def test_masks_of_another_size_or_without_white_are_refused():
    mask = np.zeros((4, 6), bool)
    with pytest.raises(UserError, match="the mask is 6x4 and the picture 4x6"):
        images.check_mask(mask, (4, 6))
    with pytest.raises(UserError, match="black all over"):
        images.check_mask(mask, (6, 4))
    mask[3, 5] = True
    images.check_mask(mask, (6, 4))


def test_masks_are_resized_as_diffusers_does():
    mask = np.zeros((397, 525), bool)
    mask[37:251, 101:333] = True
    processor = VaeImageProcessor(do_normalize=False, do_binarize=True, do_convert_grayscale=True)
    theirs = processor.preprocess(
        Image.fromarray(mask.astype(np.uint8) * 255), height=392, width=520
    )
    ours = images.resize_mask(mask, 520, 392)
    assert np.array_equal(ours, theirs[0, 0].numpy() == 1)


def test_resizing_takes_width_before_height_and_keeps_what_fits(rgb):
    assert images.resize(rgb, 5, 11).shape == (11, 5, 3)
    np.testing.assert_array_equal(images.resize(rgb, 9, 6), rgb)


@pytest.mark.parametrize("text", ["a fox\nSteps: 3", "日本 👩‍👩‍👧", "half \ud800, none \0."])
def test_saved_pictures_carry_their_settings(tmp_path, rgb, text):
    images.save_png(tmp_path / "x.png", rgb, text)
    with Image.open(tmp_path / "x.png") as file:
        assert file.text["parameters"] == text.replace("\ud800", "?").replace("\0", "")
        np.testing.assert_array_equal(file, rgb)
    assert [path.name for path in tmp_path.iterdir()] == ["x.png"]


def test_a_failed_save_leaves_the_old_picture_and_nothing_else(tmp_path, rgb, monkeypatch):
    path = write(tmp_path / "x.png", rgb)
    before = path.read_bytes()

    def full(self, file, *_, **__):
        file.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(UserError, match=r"cannot write .*x\.png: No space left"):
        images.save_png(path, rgb, "")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["x.png"]


def test_folders_that_cannot_be_written_to_are_refused(tmp_path, rgb):
    with pytest.raises(UserError, match="No such file"):
        images.save_png(tmp_path / "absent" / "x.png", rgb, "")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="Not a directory"):
        images.save_png(tmp_path / "file" / "x.png", rgb, "")


def test_parameters_are_written_as_a1111_does():
    actual = images.parameters_text(
        "a (red:1.3) fox", "blurry, dark", 30, "euler_a", 7.5, 0, (512, 768), "sd15"
    )
    assert actual == (
        "a (red:1.3) fox\n"
        "Negative prompt: blurry, dark\n"
        "Steps: 30, Sampler: Euler a, CFG scale: 7.5, Seed: 0, Size: 512x768, Model: sd15"
    )


def test_parameters_leave_out_what_is_not_set_and_quote_separators():
    actual = images.parameters_text(
        "", "", 4, "dpmpp", 7.0, 1, (64, 64), "a, b: c", karras=True, clip_skip=2, eta=None
    )
    assert actual.startswith("Steps: 4, Sampler: DPM++ 2M Karras, CFG scale: 7, Seed: 1, ")
    assert actual.endswith('Model: "a, b: c", Clip skip: 2')
    assert json.loads(actual.split("Model: ")[1].split(", Clip")[0]) == "a, b: c"


@pytest.mark.parametrize(("n", "rows", "columns"), [(1, 1, 1), (2, 1, 2), (5, 2, 3), (9, 3, 3)])
def test_grids_are_near_square_with_white_gaps(n, rows, columns):
    pictures = np.random.default_rng(0).integers(0, 255, (n, 3, 5, 3), np.uint8)
    sheet = images.grid(pictures)
    gap = images.GAP
    assert sheet.shape == (rows * 3 + (rows - 1) * gap, columns * 5 + (columns - 1) * gap, 3)
    for i, picture in enumerate(pictures):
        y, x = i // columns * (3 + gap), i % columns * (5 + gap)
        np.testing.assert_array_equal(sheet[y : y + 3, x : x + 5], picture)
    assert (sheet == 255).all(axis=2).sum() == sheet.shape[0] * sheet.shape[1] - n * 15

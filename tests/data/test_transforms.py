import numpy as np
import pytest
from PIL import Image

from jaxgen.data import transforms
from jaxgen.data.buckets import bucket_sizes, nearest_bucket
from jaxgen.data.examples import BadExample
from tests.data.folders import pixels


def rng(seed=0):
    return np.random.default_rng(seed)


def crop(example, size, random=False, columns=(), seed=0):
    return transforms.resize_and_crop(example, size, random, rng(seed), columns)


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (96, 96)], ids=str)
@pytest.mark.parametrize("stored", [(48, 48), (90, 60), (41, 97)], ids=str)
def test_pictures_are_resized_to_cover_and_the_centre_is_cropped(stored, size):
    scale = max(size[0] / stored[0], size[1] / stored[1])
    width, height = (round(side * scale) for side in stored)
    whole = Image.fromarray(pixels(0, *stored)).resize((width, height), Image.Resampling.LANCZOS)
    left, top = (width - size[0]) // 2, (height - size[1]) // 2
    expected = np.asarray(whole)[top : top + size[1], left : left + size[0]]
    actual = crop({"image": pixels(0, *stored)}, size)["image"]
    assert actual.dtype == np.uint8
    np.testing.assert_allclose(actual.astype(int), expected, atol=2)  # Pillow's box is float32


def test_a_crop_without_scaling_copies_pixels():
    image = rng().integers(0, 256, (40, 71, 3), np.uint8)
    np.testing.assert_array_equal(crop({"image": image}, (40, 40))["image"], image[:, 15:55])
    places = set()
    for seed in range(200):
        part = crop({"image": image}, (40, 40), random=True, seed=seed)["image"]
        (left,) = (x for x in range(32) if np.array_equal(part, image[:, x : x + 40]))
        places.add(left)
    assert {0, 31} < places  # both ends are reached


def test_an_example_is_not_changed_in_place():
    example = {"image": pixels(0), "caption": "x", "boxes": [[0, 0, 1, 1]], "phrases": ["x"]}
    before = {name: np.array(value) for name, value in example.items()}
    made = crop(example, (24, 16), columns=("boxes",))
    transforms.drop_caption(transforms.flip(made, rng(1)), 1, rng())
    for name, value in before.items():
        np.testing.assert_array_equal(example[name], value)


@pytest.mark.parametrize("random", [False, True])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("factor", [1, 2], ids=["same size", "twice the size"])
def test_masks_labels_hints_and_boxes_follow_the_picture(random, flip, factor):
    for seed in range(8):
        image = np.zeros((60, 90, 3), np.uint8)
        x, y = rng(seed).integers(10, 40, 2)
        image[y : y + 20, x : x + 30] = 255
        big = image.repeat(factor, 0).repeat(factor, 1)
        box = np.array([[x / 90, y / 60, (x + 30) / 90, (y + 20) / 60]], np.float32)
        example = {"image": image, "hint": big, "mask": big[..., 0] > 0, "caption": "a square"}
        example |= {"segmentation": big[..., 0].astype(np.int16) * 7, "boxes": box, "n": 3}
        columns = ("hint", "mask", "segmentation", "n", "boxes")
        made = crop(example, (48, 48), random, columns, seed)
        if flip:
            made = transforms.flip(made, rng(1), columns)  # which flips: see below
        inside = made["image"][..., 0] > 127
        assert made["mask"].dtype == bool
        assert set(np.unique(made["segmentation"])) <= {0, 255 * 7}
        for other in (made["hint"][..., 0] > 127, made["mask"], made["segmentation"] > 0):
            assert (inside != other).sum() <= 2 * 48  # a pixel along the edge
        ((x0, y0, x1, y1),) = made["boxes"] * 48
        rows, across = np.nonzero(inside)
        found = [across.min(), rows.min(), across.max() + 1, rows.max() + 1]
        np.testing.assert_allclose([x0, y0, x1, y1], found, atol=1)


def test_coloured_labels_keep_their_colours_in_a_column_of_any_name():
    labels = np.array([[200, 0, 0], [0, 90, 0], [0, 0, 70]], np.uint8)[rng().integers(0, 3, (9, 9))]
    made = crop({"image": labels, "map": labels}, (30, 30), columns=("map",))
    colours = lambda pixels: {tuple(c) for c in pixels.reshape(-1, 3).tolist()}  # noqa: E731
    assert colours(made["map"]) == colours(labels)
    assert len(colours(made["image"])) > 3  # smooth, as every picture that is drawn


def test_a_nearest_mask_equals_resizing_and_cropping_the_whole():
    mask = rng().random((60, 90)) < 0.5
    whole = Image.fromarray(mask.astype(np.uint8)).resize((45, 30), Image.Resampling.NEAREST)
    example = {"image": pixels(0, 90, 60), "mask": mask}
    actual = crop(example, (30, 30), columns=("mask",))["mask"]
    np.testing.assert_array_equal(actual, np.asarray(whole)[:, 7:37] > 0)


def test_boxes_that_leave_the_picture_go_with_their_phrases():
    # 80x40, cropped to the middle 40x40: x from 0.25 to 0.75 stays.
    boxes = [[0, 0, 0.2, 1], [0.2, 0, 0.3, 1], [0.2, 0, 0.26, 1]]
    example = {"image": pixels(0, 80, 40), "boxes": boxes, "phrases": list("abc")}
    made = crop(example, (40, 40), columns=("boxes",))
    assert made["phrases"] == ["b"]
    np.testing.assert_allclose(made["boxes"], [[0, 0, 0.1, 1]], atol=1e-6)
    nothing = crop(example | {"boxes": [], "phrases": []}, (40, 40), columns=("boxes",))
    assert nothing["boxes"].shape == (0, 4)


@pytest.mark.parametrize("boxes", [None, [{"bbox": [1, 2, 3, 4]}], [[10, 10, 60, 60]]], ids=str)
def test_boxes_that_nobody_asked_for_are_left_out(boxes):
    example = {"image": pixels(0), "caption": "", "boxes": boxes, "phrases": None}
    made = transforms.flip(crop(example, (32, 32)), rng(1))
    assert "boxes" not in made


def test_pictures_that_do_not_fit_each_other_are_bad_examples():
    example = {"image": pixels(0), "mask": np.ones((48, 60), bool)}
    with pytest.raises(BadExample, match="'mask' is 60x48 and the image 48x48"):
        crop(example, (32, 32), columns=("mask",))


@pytest.mark.parametrize(
    "boxes",
    [
        *([[0, 1]], [["a", 0, 1, 1]], 3, {}, None, [[0, 0, 1, 1], [0, 0]]),
        *([[10, 10, 60, 60]], [[0.6, 0.6, 0.2, 0.8]], [[0.1, 0.5, 0.2, 0.5]]),
        *([[float("nan")] * 4], [[-0.1, 0, 1, 1]], [[0, 0, 1, float("inf")]]),
    ],
    ids=str,
)
def test_boxes_that_are_none_make_a_bad_example(boxes):
    example = {"image": pixels(0), "boxes": boxes, "phrases": ["x"]}
    with pytest.raises(BadExample, match=r"its box|it has 0 boxes"):
        crop(example, (32, 32), columns=("boxes",))


@pytest.mark.parametrize("phrases", [None, "a", ["a", "b"], [3], [None], []], ids=str)
def test_boxes_need_a_phrase_each(phrases):
    example = {"image": pixels(0), "boxes": [[0, 0, 1, 1.00001]], "phrases": phrases}
    with pytest.raises(BadExample, match="phrases"):
        crop(example, (32, 32), columns=("boxes",))
    made = crop(example | {"phrases": ["x"]}, (32, 32), columns=("boxes",))
    np.testing.assert_array_equal(made["boxes"], [[0, 0, 1, 1]])


def test_half_of_the_examples_are_flipped_with_all_their_pictures():
    example = {"image": pixels(0), "hint": pixels(1), "caption": "x", "boxes": [[0.1, 0, 0.3, 1]]}
    flipped = 0
    for seed in range(1000):
        made = transforms.flip(example, rng(seed), ("hint",))
        if made is not example:
            flipped += 1
            np.testing.assert_array_equal(made["image"], pixels(0)[:, ::-1])
            np.testing.assert_array_equal(made["hint"], pixels(1)[:, ::-1])
            np.testing.assert_allclose(made["boxes"], [[0.7, 0, 0.9, 1]], atol=1e-6)
    assert 430 < flipped < 570  # 4.4 sigma


@pytest.mark.parametrize(
    ("text", "flips"),
    [
        ("a fox on the left", False),
        ("Right: an owl", False),
        ("the leftmost cup", False),
        ("facing RIGHTWARDS", False),
        ("a left-handed player", False),
        ("looking_left", False),
        ("upright_copyrights", True),
        ("a bright cleft, upright", True),
    ],
)
def test_flips_keep_captions_true(text, flips):
    for example in ({"caption": text}, {"caption": "", "phrases": ["x", text]}):
        example |= {"image": pixels(0), "file_name": "left/right.png"}
        made = [transforms.flip(example, rng(seed)) for seed in range(20)]
        assert any(m is not example for m in made) == flips


def test_a_column_may_forbid_flips():
    example = {"image": pixels(0), "caption": "the letter R", "flip": False}
    assert all(transforms.flip(example, rng(seed)) is example for seed in range(20))
    assert transforms.may_flip(example | {"flip": True})


def test_the_set_share_of_captions_is_emptied():
    example = {"image": pixels(0), "caption": "x"}
    generator = rng()
    dropped = [transforms.drop_caption(example, 0.2, generator) for _ in range(2000)]
    assert 320 < sum(e["caption"] == "" for e in dropped) < 480  # 4.5 sigma
    assert transforms.drop_caption(example, 0, rng()) == example
    assert transforms.drop_caption(example, 1, rng())["caption"] == ""


@pytest.mark.parametrize("strokes", [False, True])
def test_masks_cover_all_in_a_quarter_and_any_part_in_the_others(strokes):
    masks = [transforms.random_mask((40, 30), rng(seed), strokes) for seed in range(1000)]
    assert {(m.shape, m.dtype) for m in masks} == {((30, 40), np.dtype(bool))}
    whole = sum(m.all() for m in masks)
    assert 190 < whole < 330
    some = np.array([m for m in masks if not m.all()])
    assert (some.mean(0) > 0.05).all()  # every pixel is masked at times
    assert (some.mean(0) < 0.6).all()
    sizes = some.mean((1, 2))
    assert sizes.min() < 0.02
    assert sizes.max() > 0.6


def test_half_of_the_shapes_are_rectangles_and_the_others_round():
    full = 0
    masks = [transforms.random_mask((64, 64), rng(seed)) for seed in range(600)]
    shapes = [m for m in masks if m.any() and not m.all()]
    for mask in shapes:
        rows, across = np.nonzero(mask)
        box = mask[rows.min() : rows.max() + 1, across.min() : across.max() + 1]
        full += box.all()
    assert 0.4 < full / len(shapes) < 0.75  # small or cut ellipses fill their box too


@pytest.mark.parametrize(
    ("side", "step", "most"), [(512, 64, 2.0), (1024, 64, 2.0), (64, 16, 2.0), (768, 64, 4.0)]
)
def test_buckets_are_as_large_as_a_square_of_the_size_allows(side, step, most):
    sizes = bucket_sizes(side, step, most)
    assert (side, side) in sizes
    assert {(h, w) for w, h in sizes} == set(sizes)
    for w, h in sizes:
        assert w % step == h % step == 0
        assert 1 / most <= w / h <= most
        assert w * h <= side**2 < min(w, h) * (max(w, h) + step)


def test_the_bucket_of_a_picture_is_the_nearest_in_shape():
    sizes = bucket_sizes(512)
    assert nearest_bucket((3000, 3000), sizes) == (512, 512)
    assert nearest_bucket((100, 10), sizes) == (640, 384)
    assert nearest_bucket((10, 100), sizes) == (384, 640)
    for width, height in rng().integers(100, 2000, (50, 2)).tolist():
        w, h = nearest_bucket((width, height), sizes)
        ratios = [max(a * height / (b * width), b * width / (a * height)) for a, b in sizes]
        assert max(w * height / (h * width), h * width / (w * height)) == pytest.approx(min(ratios))

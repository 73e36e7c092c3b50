"""What happens to an example on the host: pure functions of it and of a random generator.

A picture and the further pictures, boxes and words of its example change together, so that what
they say of each other stays true.
"""

import re
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from jaxgen.data.examples import LABELS, MASKS, PHOTOS, BadExample, Example
from jaxgen.data.hints import is_labels

Size = tuple[int, int]  # width, height
ASPECT_SLACK = 0.02  # a pixel of rounding in a small picture
LEAST_VISIBLE = 0.25  # a box of which less than this share stays in the picture is dropped
ROUNDING = 1e-4  # by which a box may leave its picture
# Words end at underscores, too: file names and labels become captions.
SIDES = re.compile(r"(?<![^\W_])(left|right)(most|wards?)?(?![^\W_])", re.IGNORECASE)


def resize_and_crop(
    example: Example,
    size: Size,
    random: bool,
    rng: np.random.Generator,
    columns: Iterable[str] = (),
) -> Example:
    """The example with its pictures scaled to cover `size`, and cropped to it.

    Scaling is by Lanczos with antialiasing, as sampling treats a picture that it starts from;
    masks, labels and their colours by nearest neighbour, so that no value is invented. Pictures of
    one example may be stored at different sizes of one shape. Boxes, if they are asked for, are
    moved along, cut at the edge, and dropped with their phrases where less than a quarter stays
    visible; otherwise they are left out, for they would be wrong.

    Args:
        size: width and height wanted.
        random: crop anywhere; otherwise the centre.
        columns: what is asked for beside `image`: further pictures, `boxes`.

    Raises:
        BadExample: for pictures of different shapes, and for boxes that are none.
    """
    height, width = example["image"].shape[:2]
    scale = max(size[0] / width, size[1] / height)
    scaled = max(size[0], round(width * scale)), max(size[1], round(height * scale))
    spare = scaled[0] - size[0], scaled[1] - size[1]
    x, y = rng.integers(0, (spare[0] + 1, spare[1] + 1)) if random else (s // 2 for s in spare)
    box = (x / scaled[0], y / scaled[1], (x + size[0]) / scaled[0], (y + size[1]) / scaled[1])

    example = dict(example)
    for name in pictures(example, columns):
        h, w = example[name].shape[:2]
        if abs(w * height / (h * width) - 1) > ASPECT_SLACK:
            raise BadExample("", f"{name!r} is {w}x{h} and the image {width}x{height}")
        if (w, h) != size or box != (0, 0, 1, 1):  # else colours need not be counted
            example[name] = cut(example[name], box, size, _is_flat(name, example[name]))
    if "boxes" not in columns:
        example.pop("boxes", None)
        return example
    boxes, kept = crop_boxes(checked_boxes(example), box)
    example["boxes"] = boxes[kept]
    if "phrases" in example:
        example["phrases"] = [p for p, keep in zip(example["phrases"], kept) if keep]
    return example


def _is_flat(name: str, pixels: np.ndarray) -> bool:
    """Whether values between those of a picture mean nothing: masks, labels, and their colours.

    These are in columns of any name, but not in those of photos, which may have few colours, too.
    """
    return name in (*MASKS, *LABELS) or (name not in PHOTOS and is_labels(pixels))


def pictures(example: Example, columns: Iterable[str]) -> list[str]:
    """The columns of an example, of those asked for, that hold pictures; `image` is one."""
    flat = (*MASKS, *LABELS)
    return ["image", *(c for c in columns if c in flat or getattr(example[c], "ndim", 0) == 3)]


def cut(pixels: np.ndarray, box: tuple[float, ...], size: Size, nearest: bool) -> np.ndarray:
    """The part of a picture, [H, W] or uint8 [H, W, 3], scaled to `size`.

    Args:
        box: x0, y0, x1, y1 as fractions of the picture.
    """
    height, width = pixels.shape[:2]
    if (width, height) == size and box == (0, 0, 1, 1):
        return pixels
    sides = (width, height, width, height)
    edges = tuple(min(f * side, side) for f, side in zip(box, sides))  # rounding must not leave it
    how = Image.Resampling.NEAREST if nearest else Image.Resampling.LANCZOS
    kind = pixels.dtype
    if nearest and pixels.ndim == 2:  # Pillow scales neither bool nor 16 bits
        pixels = pixels.astype(np.int32)
    return np.array(Image.fromarray(pixels).resize(size, how, edges)).astype(kind, copy=False)


def checked_boxes(example: Example) -> np.ndarray:
    """The boxes of an example, float32 [N, 4], fractions; BadExample unless each has a phrase."""
    try:
        boxes = np.asarray(example["boxes"], np.float32).reshape(-1, 4)
    except (TypeError, ValueError):
        raise BadExample("", "its boxes are not lists of x0, y0, x1, y1") from None
    for box in boxes:
        x0, y0, x1, y1 = box
        inside = (box >= -ROUNDING).all() and (box <= 1 + ROUNDING).all()
        if not (inside and x0 < x1 and y0 < y1):
            shown = ", ".join(f"{side:g}" for side in box)
            raise BadExample("", f"its box {shown} is not x0 < x1, y0 < y1 as fractions, 0 to 1")
    phrases = example.get("phrases", [""] * len(boxes))
    if not isinstance(phrases, list) or not all(isinstance(phrase, str) for phrase in phrases):
        raise BadExample("", "its phrases are not a list of texts")
    if len(phrases) != len(boxes):
        raise BadExample("", f"it has {len(boxes)} boxes and {len(phrases)} phrases")
    return np.clip(boxes, 0, 1)


def crop_boxes(boxes: np.ndarray, box: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """[N, 4] boxes as fractions of a picture -> [N, 4] of its part `box`; bool [N], visible."""
    x0, y0, x1, y1 = box
    moved = (boxes - [x0, y0, x0, y0]) / [x1 - x0, y1 - y0, x1 - x0, y1 - y0]
    inside = np.clip(moved, 0, 1)
    visible = _areas(inside) > LEAST_VISIBLE * _areas(moved)  # a box of no area is not
    return inside.astype(np.float32), visible


def _areas(boxes: np.ndarray) -> np.ndarray:
    return (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])


def flip(example: Example, rng: np.random.Generator, columns: Iterable[str] = ()) -> Example:
    """One in two examples mirrored left to right, all of its pictures and boxes together.

    Never one whose caption, phrases or other texts say left or right, or whose column `flip` is
    false.
    """
    mirror = rng.random() < 0.5
    if not mirror or not may_flip(example):
        return example
    example = dict(example)
    for name in pictures(example, columns):
        example[name] = np.ascontiguousarray(example[name][:, ::-1])
    if "boxes" in example:
        x0, y0, x1, y1 = checked_boxes(example).T
        example["boxes"] = np.stack([1 - x1, y0, 1 - x0, y1], axis=1)
    return example


def may_flip(example: Example) -> bool:
    """Whether no text of it says left or right, and its column `flip` does not forbid it."""
    return example.get("flip") is not False and not any(
        SIDES.search(text) for text in _texts(example)
    )


def _texts(example: Example) -> Iterable[str]:
    """All words of an example but names of files, which say nothing of what is seen."""
    for name, value in example.items():
        values = value if isinstance(value, list) else [value]
        if not name.endswith("file_name"):
            yield from (text for text in values if isinstance(text, str))


def drop_caption(example: Example, share: float, rng: np.random.Generator) -> Example:
    """The example, in `share` of all cases with an empty caption, which guidance subtracts."""
    return example | {"caption": ""} if rng.random() < share else example


def random_mask(size: Size, rng: np.random.Generator, strokes: bool = False) -> np.ndarray:
    """A mask to train inpainting on, bool [height, width], True where to repaint.

    One in four covers everything, as Stable Diffusion's were trained. Otherwise a rectangle or an
    ellipse with sides uniform in [0, size] around a random centre or, with `strokes`, as often
    freehand lines: up to 5 strokes of up to 10 corners, 1/20 to 1/2 of the picture wide.
    """
    width, height = size
    image = Image.new("1", size)
    draw = ImageDraw.Draw(image)
    if rng.random() < 0.25:
        return np.ones((height, width), bool)
    if strokes and rng.random() < 0.5:
        for _ in range(rng.integers(1, 6)):
            corners = rng.random((rng.integers(2, 11), 2)) * size
            brush = max(1, round(rng.uniform(0.05, 0.5) * min(size)))
            draw.line([tuple(c) for c in corners.tolist()], 1, brush, "curve")
        return np.array(image)
    sides = rng.random(2) * size
    centre = rng.random(2) * size
    box = [*(centre - sides / 2).tolist(), *(centre + sides / 2).tolist()]
    shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
    shape(box, 1)
    return np.array(image)

"""Pictures from and to files: whatever a camera or an editor wrote, as uint8 [H, W, 3]."""

import functools
import json
import logging
import math
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, PngImagePlugin, UnidentifiedImageError

from jaxgen.types import UserError

MAX_PIXELS = 64_000_000
GAP = 4  # pixels of white between the pictures of a grid
# Only formats that are pictures throughout: Pillow would start Ghostscript for an EPS.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
SAMPLERS = {
    "ddim": "DDIM",
    "ddpm": "DDPM",
    "euler": "Euler",
    "euler_a": "Euler a",
    "dpmpp": "DPM++ 2M",
    "pndm": "PLMS",
    "lcm": "LCM",
    "edict": "EDICT",
}

logger = logging.getLogger(__name__)


def read_image(path: Path, background: str = "white") -> np.ndarray:
    """A picture file as uint8 [H, W, 3], upright as its EXIF orientation says.

    What is transparent is composited on the background, which is said once. Grey becomes three
    equal channels; grey of 16 bits is rounded to 8.

    Raises:
        UserError: for a file that is missing, truncated, of no known format, or has more than
            `MAX_PIXELS`, which is seen before it is decoded.
    """
    try:
        if not path.is_file():
            raise UserError(f"no such file: {path}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # counted below
            file = Image.open(path, formats=FORMATS)
    except Image.DecompressionBombError:
        raise _too_large(path, f"over {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels") from None
    except UserError:
        raise
    except Exception as error:
        raise _unreadable(path, error) from None
    with file:
        width, height = file.size
        if width * height > MAX_PIXELS:
            raise _too_large(path, f"{width}x{height} = {width * height} pixels")
        try:
            upright = ImageOps.exif_transpose(file)
            rgb, clear = to_rgb(upright, background)
        except Exception as error:  # decoders raise a dozen types at damaged data
            raise _unreadable(path, error) from None
    if clear:
        warn_once(f"transparent pictures are composited on {background}")
    return rgb


def to_rgb(image: Image.Image, background: str = "white") -> tuple[np.ndarray, bool]:
    """A picture of any mode -> (uint8 [H, W, 3], whether anything of it was transparent)."""
    if image.mode == "F":
        raise ValueError("it holds floating-point values, whose range is unknown")
    if image.mode.startswith("I"):  # 16 bits of grey; Pillow keeps some of them in 32
        deep = np.clip(np.asarray(image), 0, 65535).astype(np.uint32)
        grey = ((deep + 128) // 257).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=2), False
    if not image.has_transparency_data:
        return np.array(image.convert("RGB")), False
    rgba = image.convert("RGBA")
    lowest, _ = rgba.getchannel("A").getextrema()
    below = Image.new("RGBA", image.size, background)
    return np.array(Image.alpha_composite(below, rgba).convert("RGB")), lowest != 255


def _unreadable(path: Path, error: Exception) -> UserError:
    if isinstance(error, UnidentifiedImageError):
        return UserError(f"{path} is none of {', '.join(FORMATS)}, or is damaged")
    return UserError(f"cannot read {path}: {' '.join(str(error).split()) or type(error).__name__}")


def _too_large(path: Path, size: str) -> UserError:
    return UserError(f"{path} is too large: {size}, and the limit is {MAX_PIXELS}; scale it down")


@functools.cache
def warn_once(message: str) -> None:
    """Logs what is said once for a whole program."""
    logger.warning(message)


def read_mask(path: Path) -> np.ndarray:
    """A mask file as bool [H, W]: True, to be repainted, where it is white (luminance >= 128).

    Where it is transparent nothing is drawn, and so nothing is repainted.

    Raises:
        UserError: as `read_image` does.
    """
    return np.asarray(Image.fromarray(read_image(path, "black")).convert("L")) >= 128


def check_mask(mask: np.ndarray, size: tuple[int, int]) -> None:
    """Refuses a mask, bool [H, W], of another size than its picture, or with nothing to repaint.

    Args:
        size: width and height of the picture.

    Raises:
        UserError: it names both sizes.
    """
    width, height = size
    if mask.shape != (height, width):
        found = f"{mask.shape[1]}x{mask.shape[0]}"
        raise UserError(f"the mask is {found} and the picture {width}x{height}; they must be equal")
    if not mask.any():
        raise UserError("the mask is black all over, so nothing is repainted; white is repainted")


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """uint8 [H, W, 3] -> uint8 [height, width, 3], by Lanczos; the same one if nothing changes."""
    if image.shape[:2] == (height, width):
        return image
    return np.array(Image.fromarray(image).resize((width, height), Image.Resampling.LANCZOS))


def resize_mask(mask: np.ndarray, width: int, height: int) -> np.ndarray:
    """Bool [H, W] -> bool [height, width], by Lanczos and a threshold, as diffusers does."""
    if mask.shape == (height, width):
        return mask
    grey = Image.fromarray(mask.astype(np.uint8) * 255)
    return np.asarray(grey.resize((width, height), Image.Resampling.LANCZOS)) >= 128


def save_png(path: Path, image: np.ndarray, parameters: str) -> None:
    """Writes uint8 [H, W, 3] as a PNG whose text chunk `parameters` says how it was made.

    The file appears whole or not at all: a folder that is read while it fills, or a run that is
    stopped, never shows half a picture.

    Raises:
        UserError: where the folder is missing, full, or may not be written to.
    """
    # A NUL ends a chunk's key, and half a surrogate pair has no UTF-8.
    text = parameters.replace("\0", "").encode("utf-8", "replace").decode("utf-8")
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", text)
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        try:
            Image.fromarray(image).save(scratch, "PNG", pnginfo=info)
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def parameters_text(
    prompt: str,
    negative: str,
    steps: int,
    sampler: str,
    guidance: float,
    seed: int,
    size: tuple[int, int],
    model: str,
    karras: bool = False,
    **extra: object,
) -> str:
    """Settings in the form that A1111 and ComfyUI readers take from a PNG.

    The prompt, the negative prompt if there is one, and a last line `Steps: 30, Sampler: ...`.

    Args:
        prompt, negative, steps, guidance, seed, model: as the command's options.
        sampler: jaxgen's name; written as A1111 calls it. Unknown names stay as they are.
        size: width and height in pixels.
        karras: whether sigmas follow Karras et al.; part of the sampler's name.
        extra: more settings; `clip_skip=1` is written `Clip skip: 1`, and `None` is left out.
    """
    fields = {
        "Steps": steps,
        "Sampler": SAMPLERS.get(sampler, sampler) + " Karras" * karras,
        "CFG scale": f"{guidance:g}",
        "Seed": seed,
        "Size": f"{size[0]}x{size[1]}",
        "Model": model,
    }
    fields |= {k.replace("_", " ").capitalize(): v for k, v in extra.items() if v is not None}
    settings = ", ".join(f"{key}: {_quoted(str(value))}" for key, value in fields.items())
    lines = [prompt, f"Negative prompt: {negative}" if negative else "", settings]
    return "\n".join(line for line in lines if line)


def _quoted(value: str) -> str:
    """A value that holds a separator is written as a JSON string, so that readers can split."""
    return json.dumps(value, ensure_ascii=False) if re.search(r"[,:\n\"]", value) else value


def rows(pictures: Sequence[Sequence[np.ndarray]]) -> np.ndarray:
    """Rows of pictures of one size, uint8 [H, W, 3], perhaps of different lengths -> one sheet.

    Ends of rows are white; between pictures are `GAP` white pixels.
    """
    height, width, _ = pictures[0][0].shape
    down, across = height + GAP, width + GAP
    longest = max(map(len, pictures))
    sheet = np.full((len(pictures) * down - GAP, longest * across - GAP, 3), 255, np.uint8)
    for y, row in enumerate(pictures):
        for x, picture in enumerate(row):
            sheet[y * down : y * down + height, x * across : x * across + width] = picture
    return sheet


def grid(images: np.ndarray) -> np.ndarray:
    """uint8 [N, H, W, 3], N >= 1 -> one near-square contact sheet, uint8 [H', W', 3].

    Row by row, from the top left, with `GAP` white pixels in between; places left over are white.
    """
    columns = math.ceil(math.sqrt(len(images)))
    return rows([list(images[i : i + columns]) for i in range(0, len(images), columns)])

"""Backgrounds of emoji_scenes: a named colour, plain or with a pattern in two shades of it."""

from collections.abc import Callable
from functools import lru_cache

import numpy as np
from PIL import Image

SIDE = 64
# Two shades of each, so chosen that in CIE Lab every shade, jittered, is nearest to its own colour.
COLOURS = {
    "white": ((247, 247, 244), (224, 226, 231)),
    "gray": ((140, 143, 148), (112, 115, 121)),
    "red": ((214, 47, 50), (176, 28, 38)),
    "orange": ((247, 144, 44), (226, 115, 20)),
    "yellow": ((252, 222, 92), (241, 199, 48)),
    "green": ((92, 176, 92), (58, 138, 66)),
    "blue": ((74, 134, 230), (44, 96, 196)),
    "purple": ((142, 90, 196), (110, 60, 162)),
    "pink": ((252, 178, 210), (244, 140, 186)),
    "brown": ((138, 96, 64), (104, 68, 42)),
}
JITTER = 5  # levels of 255 by which the shades of a scene may be lighter or darker
SOFT = 3.0  # how steep an edge of a pattern is: its middle takes about a pixel


@lru_cache(maxsize=1)
def _grid() -> tuple[np.ndarray, np.ndarray]:
    """x and y of the pixels, float32 [64, 64]."""
    y, x = np.mgrid[:SIDE, :SIDE].astype(np.float32)
    return x, y


def _plain(rng: np.random.Generator) -> np.ndarray:
    return np.full((SIDE, SIDE), rng.random(), np.float32)


def _gradient(rng: np.random.Generator) -> np.ndarray:
    """From one side to the other, in any direction, or from a point outwards."""
    x, y = _grid()
    if rng.random() < 0.25:
        cx, cy = rng.uniform(0.25, 0.75, 2) * SIDE
        return np.minimum(np.hypot(x - cx, y - cy) / (0.75 * SIDE), 1)
    angle = rng.uniform(0, 2 * np.pi)
    along = x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))
    low, high = along.min(), along.max()
    return (along - low) / (high - low)


def _wave(phase: np.ndarray) -> np.ndarray:
    """Stripes with soft edges, one in every 1 of the phase."""
    return np.clip(0.5 + SOFT * np.sin(2 * np.pi * phase), 0, 1)


def _striped(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid()
    along = (x, y, (x + y) * 0.7071, (x - y) * 0.7071)[rng.integers(4)]
    return _wave(along / rng.uniform(10, 18) + rng.random())


def _wavy(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid() if rng.random() < 0.5 else _grid()[::-1]
    bend = rng.uniform(2, 4) * np.sin(x * (2 * np.pi / rng.uniform(18, 32)) + rng.uniform(0, 6))
    return _wave((y + bend) / rng.uniform(12, 18) + rng.random())


def _dotted(rng: np.random.Generator) -> np.ndarray:
    """Dots in rows, every other row moved by half."""
    x, y = _grid()
    apart = rng.uniform(10, 15)
    row = (y + rng.uniform(0, apart)) / apart
    shift = 0.5 * (np.floor(row) % 2)
    column = (x + rng.uniform(0, apart)) / apart + shift
    away = np.hypot(row % 1 - 0.5, column % 1 - 0.5) * apart
    return np.clip(apart * 0.27 - away + 0.5, 0, 1)


def _checked(rng: np.random.Generator) -> np.ndarray:
    x, y = _grid()
    side = rng.integers(7, 13)
    dx, dy = rng.integers(0, 2 * side, 2)
    return (((x + dx) // side + (y + dy) // side) % 2).astype(np.float32)


def _speckled(rng: np.random.Generator) -> np.ndarray:
    """Soft spots of all sizes up to 8 pixels, as of grass or sand."""
    spots = np.zeros((SIDE, SIDE), np.float32)
    for cells, share in ((8, 0.35), (32, 0.75)):
        noise = Image.fromarray(rng.random((cells, cells), np.float32))
        spots += share * np.asarray(noise.resize((SIDE, SIDE), Image.Resampling.BILINEAR))
    return np.clip(1.6 * spots - 0.4, 0, 1)


PATTERNS: dict[str, tuple[Callable[[np.random.Generator], np.ndarray], float]] = {
    "plain": (_plain, 0.3),
    "gradient": (_gradient, 0.2),
    "striped": (_striped, 0.1),
    "wavy": (_wavy, 0.1),
    "dotted": (_dotted, 0.1),
    "checked": (_checked, 0.1),
    "speckled": (_speckled, 0.1),
}  # and how often
_SHARES = np.cumsum([share for _, share in PATTERNS.values()])[:-1]


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [..., 3], 0 to 255 -> CIE Lab under D65, where distance is what one sees of it."""
    share = np.asarray(rgb, np.float64) / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    to_xyz = [[0.4124, 0.2126, 0.0193], [0.3576, 0.7152, 0.1192], [0.1805, 0.0722, 0.9505]]
    xyz = linear @ to_xyz / (0.9505, 1, 1.089)
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    x, y, z = np.moveaxis(f, -1, 0)
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)


def pick_colour(avoided: frozenset[str], rng: np.random.Generator) -> str:
    """The name of a colour; one of the avoided ones only where it is drawn twice running."""
    first, second = (list(COLOURS)[n] for n in rng.integers(len(COLOURS), size=2))
    return second if first in avoided else first


def pick_pattern(rng: np.random.Generator) -> str:
    """The name of a pattern, as often as they say."""
    return list(PATTERNS)[int(np.searchsorted(_SHARES, rng.random()))]


def paint(colour: str, pattern: str, rng: np.random.Generator) -> np.ndarray:
    """A background, uint8 [64, 64, 3]."""
    light, dark = np.array(COLOURS[colour], np.float32) + rng.uniform(-JITTER, JITTER)
    if rng.random() < 0.5:
        light, dark = dark, light
    share = PATTERNS[pattern][0](rng).astype(np.float32, copy=False)[..., None]
    pixels = light + share * (dark - light)
    return (np.clip(pixels, 0, 255) + 0.5).astype(np.uint8)

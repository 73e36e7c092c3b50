"""Hints of maps that are known: labels as colours, depth, normals."""

import numpy as np
from PIL import Image

from jaxgen.types import UserError

# The colours of ADE20K's 150 classes (Zhou et al. 2017), by which released ControlNets know them.
ADE20K = np.array(
    [
        tuple(bytes.fromhex(colour))
        for colour in """
        787878 b47878 06e6e6 503232 04c803 787850 8c8c8c cc05ff e6e6e6 04fa07 e005ff ebff07
        96053d 787846 08ff33 ff0652 8fff8c ccff04 ff3307 cc4603 0066c8 3de6fa ff0633 0b66ff
        ff0747 ff09e0 0907e6 dcdcdc ff095c 7009ff 08ffd6 07ffe0 ffb806 0aff47 ff290a 07ffff
        e0ff08 6608ff ff3d06 ffc207 ff7a08 00ff14 ff0829 ff0599 0633ff eb0cff a09614 00a3ff
        8c8c8c fa0a0f 14ff00 1fff00 ff1f00 ffe000 99ff00 0000ff ff4700 00ebff 00adff 1f00ff
        0bc8c8 ff5200 00fff5 003dff 00ff70 00ff85 ff0000 ffa300 ff6600 c2ff00 008fff 33ff00
        0052ff 00ff29 00ffad 0a00ff adff00 00ff99 ff5c00 ff00ff ff00f5 ff0066 ffad00 ff0014
        ffb8b8 001fff 00ff3d 0047ff ff00cc 00ffc2 00ff52 000aff 0070ff 3300ff 00c2ff 007aff
        00ffa3 ff9900 00ff0a ff7000 8fff00 5200ff a3ff00 ffeb00 08b8aa 8500ff 00ff5c b800ff
        ff001f 00b8ff 00d6ff ff0070 5cff00 00e0ff 70e0ff 46b8a0 a300ff 9900ff 47ff00 ff00a3
        ffcc00 ff008f 00ffeb 85ff00 ff00eb f500ff ff007a fff500 0abed4 d6ff00 00ccff 1400ff
        ffff00 0099ff 0029ff 00ffcc 2900ff 29ff00 ad00ff 00f5ff 4700ff 7a00ff 00ffb8 005cff
        b8ff00 0085ff ffd600 19c2c2 66ff00 5c00ff
        """.split()
    ],
    np.uint8,
)
# As its annotations are stored: 0 is none of the classes, and black.
ADE20K_FILES = np.concatenate([np.zeros((1, 3), np.uint8), ADE20K])


def distinct(count: int) -> np.ndarray:
    """Colours, uint8 [count, 3], up to 343, for labels without a palette; the first is black.

    Of a lattice of seven levels, so that any two are far apart, in an order that mixes them.
    """
    place = np.arange(count)
    place = np.where(place, (place * 97) % 342 + 1, 0)  # 97 has no divisor in common with 342
    levels = np.stack([place // 49, place // 7 % 7, place % 7], -1)
    return np.round(levels * (255 / 6)).astype(np.uint8)


def segmentation(labels: np.ndarray, palette: np.ndarray = ADE20K) -> np.ndarray:
    """Labels, whole numbers [H, W] -> their colours, uint8 [H, W, 3]; those beyond it are black.

    ADE20K's first class, wall, is 0, as networks count; in its files, that is 1 (`ADE20K_FILES`).

    Raises:
        UserError: for what holds no whole numbers.
    """
    if labels.ndim != 2 or not np.issubdtype(labels.dtype, np.integer):
        raise UserError(f"labels are {labels.dtype} {list(labels.shape)}, not whole numbers [H, W]")
    known = (labels >= 0) & (labels < len(palette))
    return np.where(known[..., None], palette[np.where(known, labels, 0)], np.uint8(0))


def depth(near: np.ndarray, size: tuple[int, int] | None = None) -> np.ndarray:
    """Inverse depth, float [H, W], of any scale -> uint8 [*size, 3]: the nearest is white."""
    share = _share(near)
    if size is not None and size != near.shape:
        picture = Image.fromarray(share)
        share = np.asarray(picture.resize(size[::-1], Image.Resampling.BICUBIC)).clip(0, 1)
    return np.repeat(np.round(255 * share).astype(np.uint8)[..., None], 3, axis=2)


def normals(near: np.ndarray, cut: float = 0.1, relief: float | None = None) -> np.ndarray:
    """Normals of a surface from inverse depth, float [H, W] -> uint8 [H, W, 3].

    x, y and z as red, green and blue, 128 is zero. As the released ControlNet's were made: x and y
    are slopes by Sobel, 8 times what depth rises by from one pixel to the next, beside z = 2 pi.

    Args:
        cut: what is farther than this, of depth scaled to 0..1, faces the viewer.
        relief: what the range of depth, from the farthest to the nearest, counts for. By default
            depth is taken as it is, as MiDaS gives it: hundreds to thousands. What is scaled to
            0..1 needs it, or all of it faces the viewer.
    """
    from scipy import ndimage  # half a second, which other commands need not wait

    share = _share(near)
    depth = near.astype(np.float32) if relief is None else np.float32(relief) * share
    x, y = (ndimage.sobel(depth, axis, mode="mirror") for axis in (1, 0))
    far = share < cut
    vectors = np.stack([np.where(far, 0, x), np.where(far, 0, y), np.full_like(x, 2 * np.pi)], -1)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.clip(vectors * 127.5 + 127.5, 0, 255).astype(np.uint8)


def _share(near: np.ndarray) -> np.ndarray:
    """Depth scaled to 0..1, float32 [H, W]: 1 is the nearest; zeros, where all is as near."""
    near = near.astype(np.float32)
    low, high = float(near.min()), float(near.max())
    return (near - low) / (high - low) if high > low else np.zeros_like(near)

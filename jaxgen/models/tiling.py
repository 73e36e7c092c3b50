"""Decoding large images in overlapping tiles, in the memory of one tile."""

from collections.abc import Callable

import jax.numpy as jnp

from jaxgen.types import Array

OVERLAP = 0.25  # of a tile's side


def decode_tiled(decode: Callable[[Array], Array], z: Array, tile: int, factor: int) -> Array:
    """Decodes tiles of latents and cross-fades their overlaps linearly, as diffusers does.

    Args:
        decode: [B, h, w, C] latents -> [B, factor h, factor w, 3]; jit it: the whole tiles have
            one shape, those at the right and the bottom a few others.
        z: [B, H, W, C] latents.
        tile: side of a tile, in latents.
        factor: pixels along a latent's side.

    Returns:
        [B, factor H, factor W, 3]; a tile's norms see its own pixels alone, so colours may differ
        slightly from those of a whole decode.
    """
    stride = int(tile * (1 - OVERLAP))
    blend = int(tile * factor * OVERLAP)
    keep = tile * factor - blend

    above: list[Array] = []
    rows = []
    for y in range(0, z.shape[1], stride):
        tiles = [decode(z[:, y : y + tile, x : x + tile]) for x in range(0, z.shape[2], stride)]
        faded: list[Array] = []
        for i, image in enumerate(tiles):
            if above:
                image = _fade(above[i], image, blend, axis=1)
            if faded:
                image = _fade(faded[-1], image, blend, axis=2)
            faded.append(image)
        rows.append(jnp.concatenate([image[:, :keep, :keep] for image in faded], 2))
        above = faded
    return jnp.concatenate(rows, 1)


def _fade(before: Array, after: Array, width: int, axis: int) -> Array:
    """The first `width` pixels of `after` along an axis, mixed with the last of `before`."""
    width = min(width, before.shape[axis], after.shape[axis])
    ramp = (jnp.arange(width) / width).reshape((1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1))
    start = [slice(None)] * 4
    start[axis] = slice(width)
    end, rest = list(start), list(start)
    end[axis], rest[axis] = slice(before.shape[axis] - width, None), slice(width, None)

    mixed = before[tuple(end)] * (1 - ramp) + after[tuple(start)] * ramp
    return jnp.concatenate([mixed, after[tuple(rest)]], axis)

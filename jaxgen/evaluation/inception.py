"""The InceptionV3 of the Fréchet inception distance: pictures as 2048 features each.

The network is TensorFlow's of 2015-12-05: published distances are of it and of no other. Its
averages leave the padding out, and its last block takes the greatest of neighbours where the others
average them (an error once, and by now part of the measure). Pictures enter as in pytorch-fid:
bilinear to 299x299 without antialiasing, 0..255 as -1..1.

train/port_inception.py makes the file that `read` wants.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from jaxgen import trees
from jaxgen.load import read_params
from jaxgen.types import Array, Params, UserError, full_precision
from jaxgen.weights import files, rename

SIDE = 299  # of the pictures that the network sees
BATCH = 16  # pictures at a time

Chain = tuple[tuple[int, int, int], ...]  # convolutions: features, height and width of the kernel
SAME, VALID, HALVED = (1, "SAME"), (1, "VALID"), (2, "VALID")  # stride and padding


class Block(NamedTuple):
    """What stands side by side in a block of the network."""

    conv: Chain  # a single convolution, or none
    towers: tuple[Chain, ...]
    averaged: int  # features made of the average of neighbours; 0 has each branch halve the image


def _sevens(width: int) -> Block:
    """Kernels that are seven long, along and across in turns."""
    one, along, across = (width, 1, 1), (width, 1, 7), (width, 7, 1)
    once, twice = (one, along, (192, 7, 1)), (one, across, along, across, (192, 1, 7))
    return Block(((192, 1, 1),), (once, twice), 192)


_FIVE: Chain = ((48, 1, 1), (64, 5, 5))
_THREES: Chain = ((64, 1, 1), (96, 3, 3), (96, 3, 3))
_SEVEN: Chain = ((192, 1, 1), (192, 1, 7), (192, 7, 1), (192, 3, 3))
BLOCKS = (
    *(Block(((64, 1, 1),), (_FIVE, _THREES), averaged) for averaged in (32, 64, 64)),
    Block(((384, 3, 3),), (_THREES,), 0),
    *(_sevens(width) for width in (128, 160, 160, 192)),
    Block((), (((192, 1, 1), (320, 3, 3)), _SEVEN), 0),
)


def _unit(
    x: Array, name: str, features: int, height: int = 1, width: int = 1, how: tuple = SAME
) -> Array:
    """Convolution and ReLU; the batch norm between them is folded into the parameters."""
    return nn.relu(nn.Conv(features, (height, width), *how, name=name)(x))


def _average(x: Array) -> Array:
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def _maximum(x: Array, how: tuple[int, str] = SAME) -> Array:
    stride, padding = how
    return nn.max_pool(x, (3, 3), (stride, stride), padding)


def _nth(name: str, i: int) -> str:
    return f"{name}_{i}" if i else name


class Tower(nn.Module):
    """Convolutions one after the other; `how` is of the last."""

    chain: Chain
    how: tuple[int, str] = SAME

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', features of the last]."""
        for i, size in enumerate(self.chain):
            how = self.how if i == len(self.chain) - 1 else SAME
            x = _unit(x, _nth("conv", i), *size, how=how)
        return x


class Mixed(nn.Module):
    """A `Block`."""

    block: Block

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H', W', features of all]."""
        conv, towers, averaged = self.block
        how = SAME if averaged else HALVED
        found = [_unit(x, "conv", *size, how=how) for size in conv]
        seen = [(x, chain) for chain in towers]
        if averaged:
            seen.append((_average(x), ((averaged, 1, 1),)))
        for i, (y, chain) in enumerate(seen):
            found.append(Tower(chain, how, name=_nth("tower", i))(y))
        return jnp.concatenate(found if averaged else [*found, _maximum(x, HALVED)], -1)


class Forked(nn.Module):
    """The last two blocks: both towers end in two convolutions side by side."""

    pool: Callable[[Array], Array]

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """[B, H, W, C] -> [B, H, W, 2048]."""
        found = [_unit(x, "conv", 320)]
        near = _unit(x, "tower_conv", 384)
        far = _unit(_unit(x, "tower_1_conv", 448), "tower_1_conv_1", 384, 3, 3)
        for name, y in (("tower_mixed_conv", near), ("tower_1_mixed_conv", far)):
            found += [_unit(y, name, 384, 1, 3), _unit(y, f"{name}_1", 384, 3, 1)]
        found.append(_unit(self.pool(x), "tower_2_conv", 192))
        return jnp.concatenate(found, -1)


class Inception(nn.Module):
    """Up to the mean over the picture of the last features; names are of TensorFlow's graph."""

    @nn.compact
    def __call__(self, images: Array) -> Array:
        """[B, 299, 299, 3] in 0..255 -> [B, 2048]."""
        x = _unit(images / 127.5 - 1, "conv", 32, 3, 3, HALVED)
        x = _unit(x, "conv_1", 32, 3, 3, VALID)
        x = _maximum(_unit(x, "conv_2", 64, 3, 3), HALVED)
        x = _unit(x, "conv_3", 80)
        x = _maximum(_unit(x, "conv_4", 192, 3, 3, VALID), HALVED)
        for i, block in enumerate(BLOCKS):
            x = Mixed(block, name=_nth("mixed", i))(x)
        x = Forked(_average, name="mixed_9")(x)
        return Forked(_maximum, name="mixed_10")(x).mean((1, 2))


def init(key: Array) -> Params:
    """Fresh parameters."""
    return Inception().init(key, jnp.zeros((1, SIDE, SIDE, 3)))["params"]


def read(path: Path) -> Params:
    """The parameters in a file of train/port_inception.py, float32.

    Raises:
        UserError: one line, for a file that is missing, damaged or of another network.
    """
    tensors = rename.by_path(files.open_file(path))
    expected = {p: leaf.shape for p, leaf in trees.flatten(trees.shapes(init)).items()}
    files.report(expected, {p: tensor.shape for p, tensor in tensors.items()}, str(path))
    return read_params({"inception": tensors})["inception"]


def features(params: Params, images: Sequence[np.ndarray], progress: bool = False) -> np.ndarray:
    """What the network sees in pictures uint8 [H, W, 3] of any sizes, float32 [N, 2048].

    Raises:
        UserError: for no pictures, and for one of another kind or shape.
    """
    if len(images) == 0:
        raise UserError("there are no pictures to see features in")
    for image in images:
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[-1] != 3 or not image.size:
            what = f"{image.dtype} {list(image.shape)}"
            raise UserError(f"a picture is {what} and should be uint8 [height, width, 3]")
    size = min(BATCH, len(images))
    found = []
    starts = range(0, len(images), size)
    for start in tqdm(starts, "Inception", unit="batch", leave=False, disable=not progress):
        batch = np.stack([_resized(image) for image in images[start : start + size]])
        room = ((0, size - len(batch)), *((0, 0),) * 3)  # one program serves all batches
        found.append(np.asarray(_see(params, np.pad(batch, room)))[: len(batch)])
    return np.concatenate(found)


def _resized(image: np.ndarray) -> np.ndarray:
    """float32 [299, 299, 3]; on the host, as each size of picture would be a program of its own."""
    x = image
    for axis in (0, 1):
        place = (np.arange(SIDE) + 0.5) * image.shape[axis] / SIDE - 0.5
        place = place.clip(0, image.shape[axis] - 1)
        low = place.astype(int)
        high = np.minimum(low + 1, image.shape[axis] - 1)
        share = (place - low).astype(np.float32).reshape(-1, *(1,) * (2 - axis))
        x = x.take(low, axis) * (1 - share) + x.take(high, axis) * share
    return x


@jax.jit
@full_precision
def _see(params: Params, images: Array) -> Array:
    return Inception().apply({"params": params}, images)

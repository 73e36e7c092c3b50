"""Models by name, without weights: `fresh:sd15` is the architecture with random parameters.

For training from nothing, and for measuring at full size where no checkpoint is at hand. Values
depend on the seed and the path of a parameter alone: not on who reads which share of it.
"""

import difflib
import functools
import math
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from jaxgen import trees
from jaxgen.types import UserError
from jaxgen.weights.files import Slices, Tensor, Tensors

PREFIX = "fresh:"
Configs = Mapping[str, Mapping[str, Any]]  # by part, the objects of its config.json

_SD15: Configs = {
    "unet": {"sample_size": 64, "cross_attention_dim": 768},
    "vae": {
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "layers_per_block": 2,
        "sample_size": 512,
    },
    "text_encoder": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "projection_dim": 768,
        "model_type": "clip_text_model",
    },
    "scheduler": {
        "_class_name": "DDIMScheduler",
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
        "prediction_type": "epsilon",
    },
}


def _changed(base: Configs, **parts: Mapping[str, Any]) -> Configs:
    return {name: {**config, **parts.get(name, {})} for name, config in base.items()}


_SD21 = _changed(
    _SD15,
    unet={
        "sample_size": 96,
        "cross_attention_dim": 1024,
        "attention_head_dim": [5, 10, 20, 20],
        "use_linear_projection": True,
        "upcast_attention": True,
    },
    vae={"sample_size": 768},
    text_encoder={
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 23,
        "num_attention_heads": 16,
        "hidden_act": "gelu",
        "projection_dim": 512,
    },
    scheduler={"prediction_type": "v_prediction"},
)
_MINI = _changed(
    _SD15,
    unet={
        "sample_size": 16,
        "block_out_channels": [48, 96, 160],
        "norm_num_groups": 16,
        "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "attention_head_dim": 4,
        "cross_attention_dim": 128,
    },
    vae={
        "block_out_channels": [16, 32, 64],
        "down_block_types": ["DownEncoderBlock2D"] * 3,
        "up_block_types": ["UpDecoderBlock2D"] * 3,
        "layers_per_block": 1,
        "norm_num_groups": 8,
        "sample_size": 64,
    },
    text_encoder={
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "projection_dim": 128,
        "vocab_size": 1199,
        "max_position_embeddings": 40,
        "bos_token_id": 1197,
        "eos_token_id": 1198,
        "pad_token_id": 1198,
    },
    scheduler={"prediction_type": "v_prediction"},
)
ARCHITECTURES = {"sd15": _SD15, "sd21-v": _SD21, "mini": _MINI}


def configs(ref: str) -> Configs:
    """The configs of `fresh:NAME`. Raises UserError for a name that is not of the zoo."""
    name = ref.removeprefix(PREFIX)
    if name not in ARCHITECTURES:
        close = difflib.get_close_matches(name, ARCHITECTURES, 1)
        hint = f"did you mean {PREFIX}{close[0]}? " if close else ""
        raise UserError(f"no architecture {ref!r}: {hint}there are {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def fresh(network: Any, part: str, seed: int = 0) -> Tensors:
    """Random parameters of a network, by path, made when they are read."""
    shapes = trees.flatten(trees.shapes(network.init))
    return {path: _tensor(f"{part}/{path}", leaf.shape, seed) for path, leaf in shapes.items()}


def _tensor(path: str, shape: tuple[int, ...], seed: int) -> Tensor:
    def read(index: Slices) -> np.ndarray:
        return _values(path, shape, seed)[index]

    return Tensor(shape, np.dtype(np.float32), read)


@functools.lru_cache(maxsize=8)  # the shares of one leaf are read one after the other
def _values(path: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """As layers initialise themselves, but what ends a residual branch of a UNet begins at zero.

    So does the prediction (Rombach et al. 2022, their code), and blocks begin as the identity.
    """
    *parents, name = path.split("/")
    last = parents[-1] if parents else ""
    if name == "bias" or (parents[0] == "unet" and last in ("conv2", "proj_out", "conv_out")):
        return np.zeros(shape, np.float32)
    if name == "scale":
        return np.ones(shape, np.float32)
    random = np.random.default_rng([zlib.crc32(path.encode()), seed])
    values = random.standard_normal(shape, np.float32)
    if name == "kernel":
        return values / np.float32(math.sqrt(math.prod(shape[:-1])))
    return values * np.float32(0.02)

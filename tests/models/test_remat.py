"""Networks whose blocks the backward pass computes again, against those that keep everything."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import trees
from jaxgen.diffusion import losses
from jaxgen.models.clip import TextEncoder
from jaxgen.models.clip_vision import VisionEncoder
from jaxgen.models.unet import UNet
from jaxgen.models.vae import VAE
from jaxgen.types import Inputs
from tests.torch_oracle import quick_jit

RNG = np.random.default_rng(0)
WIDTHS = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
NETWORKS = {
    "UNet": UNet.read(
        {
            "block_out_channels": [8],
            "down_block_types": ["CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D"],
            "layers_per_block": 1,
            "attention_head_dim": 2,
            "cross_attention_dim": 8,
            "norm_num_groups": 4,
        },
        "unet",
    ),
    "VAE": VAE.read({"block_out_channels": [8], "norm_num_groups": 4}, "vae"),
    "text": TextEncoder.read(WIDTHS | {"num_hidden_layers": 2, "vocab_size": 9}, "text"),
    "vision": VisionEncoder.read(
        WIDTHS | {"num_hidden_layers": 2, "image_size": 8, "patch_size": 4}, "vision"
    ),
}
IMAGES = RNG.standard_normal((1, 8, 8, 4), np.float32)
TEXT = Inputs(RNG.standard_normal((1, 3, 8), np.float32))
IDS = np.arange(9)[None]


def output(name, network, params):
    if name == "UNet":
        cache = network.prepare(params, TEXT)
        return network.apply(params, IMAGES, losses.point(jnp.ones(1)), cache)
    if name == "VAE":
        return network.decode(params, network.encode(params, IMAGES[..., :3], 1.0))
    return network.apply(params, IDS if name == "text" else IMAGES[..., :3])[1]


@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_the_same(name):
    shapes = trees.shapes(NETWORKS[name].init)
    params = jax.tree.map(lambda x: 0.3 * RNG.standard_normal(x.shape, np.float32), shapes)
    found = []
    for remat in (False, True):
        network = replace(NETWORKS[name], remat=remat)
        slope = jax.grad(lambda p, n=network: jnp.square(output(name, n, p)).sum())
        assert ("remat" in str(jax.make_jaxpr(slope)(params))) == remat
        found.append(jax.tree.leaves(quick_jit(slope)(params)))
    largest = max(float(jnp.abs(g).max()) for g in found[0])
    for one, other in zip(*found, strict=True):
        assert float(jnp.abs(one - other).max()) < 1e-5 * largest

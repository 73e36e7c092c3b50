"""Floating-point operations of a guided UNet call and a VAE decode of Stable Diffusion 1.5.

python benchmarks/flops.py
"""

import jax
import jax.numpy as jnp

from jaxgen.flops import count
from jaxgen.models import winograd
from jaxgen.models.unet import UNet
from jaxgen.models.vae import VAE
from jaxgen.trees import shapes
from jaxgen.types import Inputs, Point


def main() -> None:
    unet = UNet.read({"sample_size": 64, "cross_attention_dim": 768}, "SD 1.5")
    vae = VAE.read(
        {
            "block_out_channels": [128, 256, 512, 512],
            "down_block_types": ["DownEncoderBlock2D"] * 4,
            "up_block_types": ["UpDecoderBlock2D"] * 4,
            "layers_per_block": 2,
        },
        "SD 1.5",
    )
    params = shapes(unet.init)
    text = jax.ShapeDtypeStruct((2, 77, 768), jnp.float32)
    cache = jax.eval_shape(unet.prepare, params, Inputs(text))  # type: ignore[arg-type]
    latents = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    point = Point(*[None] * len(Point._fields))._replace(time=jnp.float32(0))  # type: ignore[arg-type]
    pays = winograd.pays
    for how, rule in (("as run on a CPU", pays), ("without Winograd", lambda *_, **__: False)):
        winograd.pays = rule
        call = count(lambda p, x, c: unet.apply(p, x, point, c), params, latents, cache)
        decode = count(lambda p, z: vae.decode(p, z), shapes(vae.init), latents)
        print(f"{how}: guided UNet call, 64x64 latents: {call / 1e12:.2f} TFLOP; ", end="")
        print(f"VAE decode, 512x512: {decode / 1e12:.2f} TFLOP")
    winograd.pays = pays


if __name__ == "__main__":
    main()

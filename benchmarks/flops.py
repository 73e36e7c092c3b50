"""Floating-point operations of a function, counted from its jaxpr with trip counts.

    python benchmarks/flops.py      # a guided UNet call and a VAE decode of Stable Diffusion 1.5

XLA's own count sees each loop body once; here a scan counts as often as it runs. Products alone are
counted (2 per multiply-add), and while loops, whose trips are not known, once.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import jax
import jax.numpy as jnp

from jaxgen.models import winograd
from jaxgen.models.unet import UNet
from jaxgen.models.vae import VAE
from jaxgen.trees import shapes
from jaxgen.types import Inputs, Point


def count(f: Callable, *args: Any) -> int:
    """Operations of matrix products and convolutions in `f(*args)`; arguments may be shapes."""
    return _of(jax.make_jaxpr(f)(*args).jaxpr)


def _of(jaxpr: Any) -> int:
    total = 0
    for equation in jaxpr.eqns:
        name, out = equation.primitive.name, equation.outvars[0].aval
        read = [v.aval for v in equation.invars]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            total += 2 * prod(out.shape) * prod(read[0].shape[i] for i in contracted)
        elif name == "conv_general_dilated":
            numbers = equation.params["dimension_numbers"].rhs_spec
            total += 2 * prod(out.shape) * prod(read[1].shape[i] for i in numbers[1:])
        else:
            trips = equation.params["length"] if name == "scan" else 1
            total += trips * sum(_of(inner) for inner in _inner(equation))
    return total


def _inner(equation: Any) -> list[Any]:
    """The jaxprs that an equation runs; of a custom derivative the function alone."""
    found = []
    for value in equation.params.values():
        for item in value if isinstance(value, list | tuple) else (value,):
            item = getattr(item, "jaxpr", item)
            if hasattr(item, "eqns"):
                found.append(item)
    return found


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
    latents = jax.ShapeDtypeStruct((2, 64, 64, 4), jnp.float32)
    point = Point(*[None] * len(Point._fields))._replace(time=jnp.float32(0))  # type: ignore[arg-type]
    one = jax.ShapeDtypeStruct((1, 64, 64, 4), jnp.float32)
    pays = winograd.pays
    for how, rule in (("as run on a CPU", pays), ("without Winograd", lambda *_: False)):
        winograd.pays = rule
        call = count(lambda p, x, c: unet.apply(p, x, point, c), params, latents, cache)
        decode = count(lambda p, z: vae.decode(p, z), shapes(vae.init), one)
        print(f"{how}: guided UNet call, batch 2, 64x64 latents: {call / 1e12:.2f} TFLOP; ", end="")
        print(f"VAE decode, 512x512: {decode / 1e12:.2f} TFLOP")
    winograd.pays = pays


if __name__ == "__main__":
    main()

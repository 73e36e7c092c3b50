"""A gradient through the sampler: the starting noise that makes an image brighter.

python sample/gradient.py MODEL "a fox in snow"

The same few lines carry any differentiable score of an image: the loop is a scan whose memory is
that of one step, however many there are.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np

import jaxgen
from jaxgen import conditioning, denoiser, generate, sharding
from jaxgen.diffusion import grids, guidance, samplers
from jaxgen.plan import plan
from jaxgen.request import Request
from jaxgen.types import Array, Params


def main(folder: str, prompt: str) -> None:
    model, params = jaxgen.load(folder)
    asked = Request(prompts=[prompt], sampler="ddim", steps=8)
    checked = plan(model, asked)
    pictures = conditioning.Pictures()  # none: text to image
    mesh = sharding.data_mesh(1)
    scales, inputs = conditioning.condition(model, params, checked, pictures, [0], mesh)
    grid = grids.grid(checked.schedule, asked.steps).points

    def brightness(noise: Array, params: Params) -> Array:
        cache = denoiser.prepare(model.network, params, inputs)
        denoise = denoiser.bind(model.network, params, cache)
        guided = guidance.guide(denoise, scales.scales)
        latents = samplers.unroll(samplers.ddim, guided, samplers.State(noise, ()), grid, None).x
        return model.vae.decode(params["vae"], latents).mean()

    step = jax.jit(jax.value_and_grad(brightness))
    noise, _ = generate.draw(
        np.uint32(0), np.arange(1, dtype=np.uint32), shape=checked.latent_shape
    )
    for i in range(5):
        value, slope = step(noise, params)
        print(f"iteration {i}: mean brightness {float(value):+.4f}")
        noise = noise + 2.0 * slope / jnp.linalg.norm(slope)


if __name__ == "__main__":
    main(*sys.argv[1:])

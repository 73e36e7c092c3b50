"""The gradient of a score of the finished image, back through the sampler to the first noise."""

from functools import cache
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxgen
from jaxgen import denoiser
from jaxgen.diffusion import grids, guidance, samplers
from jaxgen.diffusion.schedule import Schedule
from jaxgen.types import Inputs
from tests.torch_oracle import error, nhwc

TINY = Path(__file__).parent / "assets" / "tiny"
STEPS, SCALE = 4, 3.0
RNG = np.random.default_rng(0)
NOISE = RNG.normal(size=(1, 6, 5, 4))
TEXT = RNG.normal(size=(2, 77, 32))  # the negative prompt's and the prompt's
TARGET = RNG.normal(size=(1, 24, 20, 3))


@pytest.fixture(scope="module")
def tiny():
    return jaxgen.load(TINY)


def finished(model, params, noise, text, points):
    """Noise [1, h, w, C] -> image, by DDIM under guidance."""
    cache = denoiser.prepare(model.network, params, Inputs(text))
    denoise = guidance.guide(denoiser.bind(model.network, params, cache), jnp.asarray([SCALE]))
    state = samplers.unroll(samplers.ddim, denoise, samplers.State(noise, ()), points, None)
    return model.vae.decode(params["vae"], state.x)


@pytest.fixture(scope="module")
def program(tiny):
    """program(steps) -> the score's value and gradient, compiled, and its other arguments."""
    model, params = tiny

    def score(noise, params, points):
        return jnp.square(finished(model, params, noise, TEXT, points) - TARGET).mean()

    @cache
    def make(steps):
        points = grids.grid(Schedule.read(model.scheduler, "ddim", ""), steps).points
        wide = jax.tree.map(widen, (params, points))
        with jax.enable_x64(True):
            return jax.jit(jax.value_and_grad(score)).trace(NOISE, *wide), wide

    return make


def widen(leaf):
    return np.asarray(leaf, np.float64) if leaf.dtype.kind == "f" else leaf


@pytest.fixture(scope="module")
def value_and_gradient(program):
    traced, wide = program(STEPS)
    compiled = traced.lower().compile()

    def run(noise):
        with jax.enable_x64(True):
            value, gradient = compiled(noise, *wide)
            return float(value), np.asarray(gradient)

    run.compiled = compiled
    return run


def test_nothing_falls_to_float32_in_float64(program):
    text = str(program(STEPS)[0].jaxpr)
    assert "f64[" in text
    for narrow in ("f32[", "bf16[", "f16["):
        assert narrow not in text


def test_gradient_matches_central_differences(value_and_gradient):
    _, gradient = value_and_gradient(NOISE)
    for _ in range(4):
        step = 1e-5 * RNG.normal(size=NOISE.shape)
        rise = value_and_gradient(NOISE + step)[0] - value_and_gradient(NOISE - step)[0]
        expected = 2 * (gradient * step).sum()
        assert abs(rise - expected) <= 1e-6 * abs(expected)


def test_gradient_matches_autograd_through_diffusers(value_and_gradient, monkeypatch):
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(TINY)
    unet, vae = pipe.unet.double(), pipe.vae.double()
    monkeypatch.setattr(type(unet.time_proj), "forward", waves)
    scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config)
    scheduler.set_timesteps(STEPS)
    alphas = torch.cumprod((1 - scheduler.betas).double(), 0)  # a product diffusers rounds
    scheduler.alphas_cumprod, scheduler.final_alpha_cumprod = alphas, alphas[0]

    noise = torch.from_numpy(NOISE).permute(0, 3, 1, 2).requires_grad_()
    x, text = noise, torch.from_numpy(TEXT)
    for t in scheduler.timesteps:
        negative, positive = unet(torch.cat([x, x]), t, text).sample.chunk(2)
        prediction = negative + SCALE * (positive - negative)
        x = scheduler.step(prediction, t, x).prev_sample
    image = vae.decode(x / vae.config.scaling_factor).sample
    value = (image - torch.from_numpy(TARGET).permute(0, 3, 1, 2)).square().mean()
    value.backward()

    actual, gradient = value_and_gradient(NOISE)
    assert abs(actual / value.item() - 1) <= 1e-6
    assert error(gradient, nhwc(noise.grad)) <= 1e-6


def waves(module, time):
    """Sinusoids in float64; diffusers has them in float32 only, whatever its network is in."""
    half = module.num_channels // 2
    frequency = torch.exp(-np.log(10000.0) * torch.arange(half, dtype=torch.float64) / half)
    angle = time.double()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], -1)


def test_memory_of_a_gradient_does_not_grow_by_the_activations_of_a_step(
    program, value_and_gradient
):
    few = value_and_gradient.compiled.memory_analysis().temp_size_in_bytes
    with jax.enable_x64(True):
        compiled = program(4 * STEPS)[0].lower().compile()
    many = compiled.memory_analysis().temp_size_in_bytes
    assert many - few <= 2 * 3 * STEPS * NOISE.nbytes  # the latents of the added steps, with slack

"""Guidance against diffusers and its own formula in numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg

from jaxgen.diffusion.grids import grid
from jaxgen.diffusion.guidance import guide
from jaxgen.diffusion.samplers import SAMPLERS, State, unroll
from jaxgen.diffusion.schedule import Schedule
from tests.torch_oracle import error

SHAPE = (3, 4, 5, 2)
X = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
POINTS = grid(Schedule(), 10).points
PUSH = np.array([0.3, -1.2, 0.7], np.float32)  # what each condition does to a prediction


def at(i):
    return jax.tree.map(lambda field: field[i], POINTS)


def network(conditions):
    """A network under conditions [B, G], image-major: nonlinear, and it looks at the time."""

    def denoise(x, point):
        assert len(x) == len(conditions)
        x = jnp.repeat(x, conditions.shape[1], axis=0)
        push = conditions.reshape(-1, 1, 1, 1)
        return jnp.tanh(x * (1 + push**2) + push + point.time / 1000)

    return denoise


def branches(count):
    """What that network says under each condition: [G] of [B, H, W, C]."""
    return [np.tanh(X * (1 + p**2) + p + at(3).time / 1000) for p in PUSH[:count]]


def conditions(count):
    return np.tile(PUSH[:count], (len(X), 1))


def test_two_branches_are_classifier_free_guidance():
    uncond, cond = branches(2)
    actual = guide(network(conditions(2)), jnp.array([7.5]))(X, at(3))
    assert error(actual, uncond + 7.5 * (cond - uncond)) < 1e-6


def test_three_branches_are_those_of_instruct_pix2pix():
    uncond, image, text = branches(3)
    actual = guide(network(conditions(3)), jnp.array([1.5, 7.5]))(X, at(3))
    assert error(actual, uncond + 7.5 * (text - image) + 1.5 * (image - uncond)) < 1e-6


@pytest.mark.parametrize("rescale", [0.0, 0.7, 1.0])
def test_rescaled_guidance_is_that_of_diffusers(rescale):
    uncond, cond = branches(2)
    guided = torch.from_numpy(uncond + 7.5 * (cond - uncond))
    expected = rescale_noise_cfg(guided, torch.from_numpy(cond), guidance_rescale=rescale)
    actual = guide(network(conditions(2)), jnp.array([7.5]), rescale)(X, at(3))
    assert error(actual, expected) < 1e-6


def test_each_image_keeps_its_own_conditions():
    table = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
    together = guide(network(table), jnp.array([3.0]), 0.5)(X, at(3))
    for i in range(3):
        alone = guide(network(table[i : i + 1]), jnp.array([3.0]), 0.5)(X[i : i + 1], at(3))
        assert error(alone[0], together[i]) < 1e-6


@pytest.mark.parametrize(
    ("interval", "acting"),
    [
        ((0.0, 1.0), range(10)),
        ((0.3, 0.7), range(3, 7)),
        ((0.25, 0.55), range(3, 6)),
        ((0.0, 0.0), range(0)),
    ],
)
def test_outside_its_interval_guidance_is_exactly_the_last_branch(interval, acting):
    def predict(scale, i, interval):
        return guide(network(conditions(2)), jnp.array([scale]), 0.5, interval)(X, at(i))

    for i in range(10):
        last = predict(1.0, i, (0.0, 0.0))
        assert (i not in acting) == np.array_equal(predict(5.0, i, interval), last)


def test_scales_rescale_and_interval_compile_once():
    traces = []

    @jax.jit
    def run(scales, rescale, interval):
        traces.append(1)
        denoise = guide(network(conditions(2)), scales, rescale, interval)
        return unroll(SAMPLERS["ddim"].step, denoise, State(X, ()), POINTS, None).x

    first = run(jnp.array([2.0]), 0.0, (0.0, 1.0))
    second = run(jnp.array([7.5]), 0.7, (0.2, 0.8))
    assert len(traces) == 1
    assert error(first, second) > 1e-3


def test_a_network_fresh_from_zeros_is_guided_with_finite_gradients():
    def score(weight):
        denoise = guide(lambda x, point: weight * jnp.repeat(x, 2, axis=0), jnp.array([7.5]), 0.7)
        return denoise(X, at(3)).sum()

    value, slope = jax.value_and_grad(score)(0.0)
    assert value == 0
    assert np.isfinite(slope)


def test_predictions_in_bfloat16_are_combined_in_float32():
    def half(x, point):
        return network(conditions(2))(x, point).astype(jnp.bfloat16)

    assert guide(half, jnp.array([7.5]))(X, at(3)).dtype == jnp.float32

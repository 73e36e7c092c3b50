"""What the network is asked in training, against diffusers' schedulers and closed forms."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr

from jaxgen.diffusion import losses
from jaxgen.diffusion.losses import Objective
from jaxgen.diffusion.schedule import Schedule
from jaxgen.types import UserError
from tests.torch_oracle import error

SHAPE = (6, 5, 7, 4)
TIMES = np.array([0, 1, 250, 500, 998, 999])
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def chance(seed=0):
    drawn = losses.draw(jax.random.split(jax.random.key(seed), SHAPE[0]), SHAPE[1:], 1000)
    return drawn._replace(time=jnp.asarray(TIMES))


def latents():
    return jnp.asarray(np.random.default_rng(1).standard_normal(SHAPE, np.float32))


@pytest.mark.parametrize(
    ("prediction", "zero_snr"),
    [
        ("epsilon", False),
        ("v_prediction", False),
        ("sample", False),
        ("v_prediction", True),
        ("sample", True),
    ],
)
def test_input_and_target_are_diffusers(prediction, zero_snr):
    theirs = DDPMScheduler(**SCHEDULE, prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    schedule = Schedule(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    drawn = chance()
    question = losses.ask(Objective(schedule), latents(), drawn)
    x, noise, time = (torch.tensor(np.asarray(a)) for a in (latents(), drawn.noise, TIMES))
    assert error(question.x, theirs.add_noise(x, noise, time)) < 1e-6
    expected = {"epsilon": noise, "v_prediction": theirs.get_velocity(x, noise, time), "sample": x}
    assert error(question.target, expected[prediction]) < 1e-6
    np.testing.assert_array_equal(question.weight, 1)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_min_snr_weights_are_those_of_the_paper(prediction):
    theirs = DDPMScheduler(**SCHEDULE)
    ratio = compute_snr(theirs, torch.arange(1000)).double().numpy()
    clipped = np.minimum(ratio, 5)
    expected = {"epsilon": clipped / ratio, "v_prediction": clipped / (ratio + 1)}
    objective = Objective(Schedule(prediction_type=prediction), snr_gamma=5.0)
    weight = losses.tables(objective)[2]
    np.testing.assert_allclose(weight, expected.get(prediction, clipped), rtol=2e-4)


def test_offset_moves_a_channel_and_the_target_perturbation_only_the_input():
    drawn, plain = chance(), losses.ask(Objective(Schedule()), latents(), chance())
    moved = losses.ask(Objective(Schedule(), offset_noise=0.1), latents(), drawn)
    channel = np.asarray(moved.target - plain.target)
    np.testing.assert_allclose(channel, np.broadcast_to(0.1 * drawn.offset, SHAPE), atol=1e-6)
    shaken = losses.ask(Objective(Schedule(), input_perturbation=0.1), latents(), drawn)
    np.testing.assert_array_equal(shaken.target, plain.target)
    sigma = losses.tables(Objective(Schedule()))[1][TIMES][:, None, None, None]
    np.testing.assert_allclose(shaken.x - plain.x, 0.1 * sigma * drawn.perturbation, atol=1e-6)


def test_the_loss_is_the_weighted_mean_square():
    question = losses.ask(Objective(Schedule(), snr_gamma=5.0), latents(), chance())
    guess = latents()
    square = np.square(np.asarray(guess - question.target, np.float64)).mean((1, 2, 3))
    expected = (np.asarray(question.weight, np.float64) * square).mean()
    assert abs(float(losses.loss(guess, question)) - expected) < 1e-6 * expected


def test_draws_are_standard_and_reach_every_step():
    drawn = losses.draw(jax.random.split(jax.random.key(3), 5000), (4, 4, 4), 10)
    np.testing.assert_allclose(np.bincount(drawn.time, minlength=10) / 5000, 0.1, atol=0.02)
    for noise in (drawn.noise, drawn.offset, drawn.perturbation):
        assert abs(float(noise.mean())) < 0.02
        assert abs(float(noise.std()) - 1) < 0.02
    assert abs(float(jnp.corrcoef(drawn.noise.ravel(), drawn.perturbation.ravel())[0, 1])) < 0.02


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"snr_gamma": 0.0}, "snr_gamma"),
        ({"offset_noise": -0.1}, "offset_noise"),
        ({"schedule": Schedule(rescale_betas_zero_snr=True)}, "v_prediction"),
    ],
)
def test_an_objective_that_cannot_be_learned_is_refused(settings, words):
    with pytest.raises(UserError, match=words):
        Objective(**{"schedule": Schedule()} | settings)

"""Inversion against diffusers' inverse scheduler, and against the way it undoes."""

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgen.diffusion import grids, inversion, samplers
from jaxgen.diffusion.schedule import Schedule
from jaxgen.types import UserError
from tests.torch_oracle import error

CLEAN = np.random.default_rng(0).normal(size=(2, 4, 5, 3)).astype(np.float32)


def toy(x, point):
    return jnp.tanh(0.3 * x) + 1e-4 * point.time


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
@pytest.mark.parametrize("one", [False, True])
def test_each_step_is_that_of_diffusers(prediction, spacing, one):
    schedule = Schedule(prediction_type=prediction, timestep_spacing=spacing, set_alpha_to_one=one)
    if prediction == "sample" and one:
        with pytest.raises(UserError, match="clean sample"):
            inversion.backwards(schedule, 10)
        return
    scheduler = diffusers.DDIMInverseScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type=prediction, timestep_spacing=spacing, steps_offset=1, set_alpha_to_one=one,
    )  # fmt: skip
    scheduler.set_timesteps(10)
    points = inversion.backwards(schedule, 10).points
    np.testing.assert_array_equal(points.time, scheduler.timesteps)
    np.testing.assert_array_equal(points.index, range(9, -1, -1))  # as the steps that they undo
    x, state = torch.from_numpy(CLEAN), samplers.State(jnp.asarray(CLEAN), ())
    for i, t in enumerate(scheduler.timesteps):
        point = jax.tree.map(lambda f: f[i], points)  # noqa: B023
        x = scheduler.step(torch.tanh(0.3 * x) + 1e-4 * t, t, x).prev_sample
        state = samplers.ddim(toy, state, point, None)
        assert error(state.x, x.numpy()) < 1e-5


def test_many_steps_lead_back_to_where_they_came_from():
    schedule = Schedule()
    errors = []
    for steps in (10, 100, 500):
        points = inversion.backwards(schedule, steps).points
        noise, way = inversion.invert(toy, jnp.asarray(CLEAN), points)
        np.testing.assert_array_equal(way[-1], noise)
        points = grids.grid(schedule, steps).points
        again = samplers.unroll(samplers.ddim, toy, samplers.State(noise, ()), points, None).x
        errors.append(error(again, CLEAN))
    assert errors[0] > 3 * errors[1] > 6 * errors[2]
    assert errors[2] < 0.02

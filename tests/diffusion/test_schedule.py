"""Schedules and grids against diffusers, published numbers and invariants."""

import dataclasses
import inspect
import itertools
import json
import math

import diffusers
import numpy as np
import pytest

from jaxgen.config import AnyOf
from jaxgen.diffusion.grids import MAX_STEPS, grid, pad
from jaxgen.diffusion.schedule import KINDS, Schedule, alphas_cumprod
from jaxgen.types import UserError

SPACINGS = ("leading", "linspace", "trailing")
SD15 = {
    "_class_name": "PNDMScheduler",
    "_diffusers_version": "0.6.0",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
    "clip_sample": False,
}


def theirs(sampler, **config):
    return getattr(diffusers, KINDS[sampler].name).from_config(config)


def config_of(schedule):
    """The object of a `scheduler_config.json` that diffusers reads to the same schedule."""
    kind = KINDS[schedule.sampler]
    data = {"_class_name": kind.name} | {key: getattr(schedule, key) for key in kind.fields}
    return data | ({"skip_prk_steps": True} if schedule.sampler == "pndm" else {})


def test_stable_diffusion_has_its_published_numbers():
    alphas = alphas_cumprod(Schedule())
    assert alphas.dtype == np.float64
    assert alphas.shape == (1000,)
    sigmas = np.sqrt((1 - alphas) / alphas)
    np.testing.assert_allclose(alphas[[0, -1]], [0.99914998, 0.00466010], atol=1e-8, rtol=0)
    np.testing.assert_allclose(np.sqrt(alphas[-1]), 0.0682649, rtol=1e-6)
    np.testing.assert_allclose(alphas[-1] / (1 - alphas[-1]), 0.0046819, rtol=1e-5)
    np.testing.assert_allclose(sigmas[[0, -1]], [0.0291675, 14.614647], rtol=1e-5)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(
    "changes",
    [
        {"beta_schedule": "linear", "beta_end": 0.02},
        {"beta_schedule": "scaled_linear"},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 333},
        {"trained_betas": (0.1, 0.2, 0.4), "num_train_timesteps": 3},
    ],
    ids=str,
)
def test_the_table_of_alphas_is_that_of_diffusers(changes, zero):
    schedule = Schedule(**changes, rescale_betas_zero_snr=zero)
    expected = theirs("ddim", **config_of(schedule)).alphas_cumprod.numpy()
    # rescaling subtracts near-equals in float32, where torch's square root is an ulp off
    np.testing.assert_allclose(alphas_cumprod(schedule), expected, rtol=2e-5 if zero else 1e-7)
    assert (alphas_cumprod(schedule)[-1] == 0) == zero


@pytest.mark.parametrize("sampler", KINDS)
def test_fields_and_defaults_are_those_of_the_class_in_diffusers(sampler):
    kind = KINDS[sampler]
    signature = inspect.signature(getattr(diffusers, kind.name).__init__)
    defaults = {k: p.default for k, p in signature.parameters.items() if k != "self"}
    assert {k: defaults.pop(k) for k in kind.fields} == kind.fields
    assert defaults.keys() == kind.fixed.keys()
    for key, only in kind.fixed.items():
        if key != "skip_prk_steps":  # the one default that is not supported
            assert only is ... or defaults[key] in (only if isinstance(only, AnyOf) else (only,))


@pytest.mark.parametrize("sampler", KINDS)
def test_another_sampler_keeps_the_files_keys_as_diffusers_does(sampler):
    schedule = Schedule.read(SD15, sampler, "test")
    scheduler = theirs(sampler, **SD15)
    for key in KINDS[sampler].fields:
        assert getattr(schedule, key) == scheduler.config[key], key
    assert Schedule.read(SD15, None, "test").sampler == "pndm"


@pytest.mark.parametrize("sampler", KINDS)
def test_a_written_config_reads_back_the_same_here_and_in_diffusers(sampler):
    changes = {"steps_offset": 3, "prediction_type": "v_prediction", "beta_end": 0.013}
    schedule = Schedule.read(SD15 | changes, sampler, "test")
    written = json.loads(json.dumps(config_of(schedule)))
    if sampler == "edict":  # which diffusers has not: what is written is the class of its points
        schedule = dataclasses.replace(schedule, sampler="ddim")
    assert Schedule.read(written, None, "test") == schedule

    scheduler = theirs(sampler, **written)
    assert {key: scheduler.config[key] for key in config_of(schedule) if key[0] != "_"} == {
        key: value for key, value in written.items() if key[0] != "_"
    }
    again = Schedule.read(json.loads(scheduler.to_json_string()), None, "test")
    assert again == schedule


def test_schedules_are_values():
    read = Schedule.read({"_class_name": "DDIMScheduler", "trained_betas": [0.1] * 1000}, None, "t")
    assert hash(read) == hash(Schedule.read(config_of(read), None, "t"))


@pytest.mark.parametrize(
    ("config", "sampler", "message"),
    [
        ({"_class_name": "HeunDiscreteScheduler"}, None, "HeunDiscreteScheduler.*name one of"),
        ({}, None, "_class_name None"),
        ({}, "heun", "'heun' is not one of ddim"),
        ({}, "pndm", "Runge-Kutta.*choose another"),
        ({"skip_prk_steps": False}, "pndm", "Runge-Kutta"),
        (SD15 | {"rescale_betas_zero_snr": True}, None, "PNDM has no form for rescale"),
        (SD15 | {"prediction_type": "sample"}, None, "PNDM has no form for prediction_type"),
        ({"prediction_type": "flow"}, "ddim", "prediction_type = 'flow' is not one of epsilon"),
        ({"thresholding": True}, "ddim", "thresholding = True is not supported"),
        ({"beta_strat": 0.1}, "ddim", "'beta_strat' .perhaps beta_start"),
        ({"sampler": "ddim"}, "ddim", "unknown field 'sampler'"),
        ({"variance_type": "learned"}, "ddpm", "variance_type = 'learned'"),
        ({"variance_type": "learned"}, "dpmpp", "variance_type = 'learned'"),
        ({"timestep_type": "continuous"}, "euler", "timestep_type"),
        ({"use_exponential_sigmas": True}, "euler", "use_exponential_sigmas"),
        ({"use_flow_sigmas": True}, "dpmpp", "use_flow_sigmas"),
        ({"algorithm_type": "sde-dpmsolver++"}, "dpmpp", "algorithm_type"),
        ({"solver_order": 3}, "dpmpp", "solver_order = 3 is not one of 1, 2"),
        ({"trained_betas": [0.1]}, "ddim", "trained_betas holds 1 values, not 1000"),
        ({"trained_betas": [0.0] * 1000}, "ddim", "trained_betas holds values that are not above"),
        ({"steps_offset": 0.5}, "ddim", "steps_offset = 0.5 is not of type int"),
        ({"beta_end": 1e-9}, "ddim", "do not rise"),
    ],
    ids=str,
)
def test_what_is_not_supported_is_refused_in_one_line(config, sampler, message):
    with pytest.raises(UserError, match=message) as raised:
        Schedule.read(config, sampler, "scheduler_config.json")
    assert "\n" not in str(raised.value)


def test_fields_of_other_classes_are_no_concern_of_a_sampler():
    config = {"use_flow_sigmas": True, "use_karras_sigmas": True, "variance_type": "fixed_small"}
    assert Schedule.read(config, "ddim", "t") == Schedule.read({}, "ddim", "t")
    assert Schedule.read({"variance_type": "fixed_small"}, "dpmpp", "t").sampler == "dpmpp"


@pytest.mark.parametrize("sampler", KINDS)
@pytest.mark.parametrize("name", ["UniPCMultistep", "DEISMultistep", "HeunDiscrete", "LMSDiscrete"])
def test_files_of_samplers_that_are_none_of_ours_serve_another(name, sampler):
    scheduler = getattr(diffusers, f"{name}Scheduler")(beta_schedule="scaled_linear")
    written = json.loads(scheduler.to_json_string()) | {"skip_prk_steps": True}
    if name == "DEISMultistep":  # DPM-Solver's class in diffusers asks for it
        written["final_sigmas_type"] = "sigma_min"
    schedule = Schedule.read(written, sampler, "t")
    expected = theirs(sampler, **written).config
    for field in KINDS[sampler].fields.keys() - {"trained_betas"}:
        assert getattr(schedule, field) == expected[field], field


@pytest.mark.parametrize(("sampler", "spacing"), [*itertools.product(KINDS, SPACINGS)])
def test_timesteps_and_initial_noise_are_those_of_diffusers(sampler, spacing):
    schedule = Schedule(sampler=sampler, timestep_spacing=spacing)
    scheduler = theirs(sampler, **config_of(schedule))
    for steps in (1, 2, 3, 6, 7, 20, 50, *(() if sampler == "lcm" else (61, 99, 333))):
        points, initial, length = grid(schedule, steps)
        scheduler.set_timesteps(steps)
        expected = scheduler.timesteps.numpy()
        if spacing == "trailing" and steps == 61:  # numpy.arange's stray 62nd value
            expected = expected[:length]
        np.testing.assert_allclose(points.time, expected, rtol=1e-6)
        np.testing.assert_allclose(initial, float(scheduler.init_noise_sigma), rtol=1e-6)


@pytest.mark.parametrize("sampler", ["euler", "dpmpp"])
def test_karras_timesteps_are_those_of_diffusers(sampler):
    schedule = Schedule(sampler=sampler, use_karras_sigmas=True, timestep_spacing="linspace")
    scheduler = theirs(sampler, **config_of(schedule))
    for steps in (1, 2, 10, 20, 100):
        scheduler.set_timesteps(steps)
        times = grid(schedule, steps).points.time
        np.testing.assert_allclose(times, scheduler.timesteps, atol=1e-2, rtol=0)
    if sampler == "dpmpp":
        published = "999,962,921,876,827,772,710,640,561,474,380,285,197,123,69,35,15,6,2,0"
        times = grid(schedule, 20).points.time
        assert ",".join(f"{t:.0f}" for t in times) == published


@pytest.mark.parametrize(
    ("sampler", "spacing", "zero"), [*itertools.product(KINDS, SPACINGS, (False, True))]
)
def test_rows_keep_their_variances_and_are_finite(sampler, spacing, zero):
    if sampler == "pndm" and zero:
        return
    schedule = Schedule(
        sampler=sampler,
        timestep_spacing=spacing,
        rescale_betas_zero_snr=zero,
        prediction_type="v_prediction",
    )
    if sampler == "edict" and zero and spacing != "leading":
        with pytest.raises(UserError, match="begins with none; use ddim"):
            grid(schedule, 10)
        return
    for steps in (1, 2, 17, 50, 998):
        if sampler == "lcm" and steps > 50:
            continue
        p, _, length = grid(schedule, steps, eta=float(sampler == "ddim"))
        assert length == steps + (sampler == "pndm" and steps > 1)
        np.testing.assert_allclose(p.keep**2 + p.fresh**2, p.noise_next**2, rtol=1e-5, atol=1e-12)
        np.testing.assert_allclose(
            (p.scale * p.signal) ** 2 + (p.scale * p.noise) ** 2, 1, rtol=1e-6
        )
        assert all(np.isfinite(f).all() for f in p._replace(weights=p.weights[:, 1:]))
        assert {f.dtype.name for f in p} == {"float32", "int32"}
        # clean and eps are together what x is
        np.testing.assert_allclose(p.signal * p.clean[:, 0] + p.noise * p.eps[:, 0], 1, rtol=1e-5)
        np.testing.assert_allclose(
            p.signal * p.clean[:, 1] + p.noise * p.eps[:, 1], 0, atol=1e-5 * p.noise.max()
        )


@pytest.mark.parametrize("sampler", KINDS)
def test_a_grid_of_as_many_steps_as_timesteps_is_finite(sampler):
    schedule = Schedule(sampler=sampler, timestep_spacing="trailing", original_inference_steps=1000)
    points, _, length = grid(schedule, MAX_STEPS)
    assert all(np.isfinite(f).all() for f in points._replace(weights=points.weights[:, 1:]))
    assert len(pad(points).time) > length


def test_points_count_what_is_run():
    points = grid(Schedule(sampler="pndm"), 20, start=5).points
    np.testing.assert_array_equal(points.index[5:], np.arange(16))
    assert set(points.steps.tolist()) == {16}


def test_padding_adds_terminal_rows_only():
    points = grid(Schedule(), 7).points
    padded = pad(points)
    for field, longer in zip(points, padded, strict=True):
        np.testing.assert_array_equal(field, longer[:7])
        assert longer.dtype == field.dtype
        assert len(longer) == MAX_STEPS + 2
        assert np.isfinite(longer[7:]).all()
    assert set(padded.signal[7:]) == {1}
    assert set(padded.noise[7:]) == {0}


@pytest.mark.parametrize(
    ("changes", "arguments", "message"),
    [
        ({}, {"steps": 0}, "steps = 0 is not 1 to 1000"),
        ({}, {"steps": 1001}, "steps = 1001"),
        ({"num_train_timesteps": 50}, {"steps": 51}, "steps = 51 is not 1 to 50"),
        ({}, {"steps": 1000}, "steps_offset = 1 need.*take fewer"),
        ({"sampler": "dpmpp", "steps_offset": 0}, {"steps": 1000}, "leading spacing"),
        ({"sampler": "lcm"}, {"steps": 51}, "original_inference_steps"),
        ({"sampler": "lcm"}, {"steps": 11, "share": 0.2}, "strength 0.2 leaves 10 of the 50"),
        ({}, {"steps": 5, "start": 5}, "start = 5"),
        ({}, {"steps": 5, "eta": 1.5}, "eta = 1.5 is not 0 to 1"),
        ({}, {"steps": 5, "eta": math.nan}, "eta = nan"),
        ({"sampler": "euler"}, {"steps": 5, "eta": 0.5}, "eta = 0.5 has no meaning for euler"),
        *(
            (
                {"sampler": s, "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"},
                {"steps": 5},
                "v_prediction",
            )
            for s in ("ddim", "ddpm", "lcm")
        ),
    ],
    ids=str,
)
def test_impossible_runs_are_refused_in_one_line(changes, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        grid(Schedule(**changes), **arguments)
    assert "\n" not in str(raised.value)


def test_a_later_start_needs_no_signal_at_the_first_row():
    schedule = Schedule(rescale_betas_zero_snr=True, timestep_spacing="trailing")
    assert all(np.isfinite(f[1:, ...]).all() for f in grid(schedule, 5, start=1).points[:-3])

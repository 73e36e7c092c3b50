"""Samplers against diffusers' schedulers, state by state, and against closed forms."""

import importlib
import itertools
from functools import cache

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgen.diffusion.grids import grid, pad
from jaxgen.diffusion.samplers import SAMPLERS, State, unroll, walk
from jaxgen.diffusion.schedule import KINDS, Schedule
from tests.torch_oracle import error

SHAPE = (2, 2, 3, 5)  # any layout serves: the toy mixes the last axis alone
RNG = np.random.default_rng(0)
MIX = RNG.normal(size=(5, 5)).astype(np.float32) / 2
TILT = RNG.normal(size=5).astype(np.float32)
NOISE, CLEAN = (RNG.normal(size=SHAPE).astype(np.float32) for _ in range(2))
SPACINGS = ("leading", "linspace", "trailing")
PREDICTIONS = ("epsilon", "v_prediction", "sample")
STABLE_DIFFUSION = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
}


def toy(x, point):
    """A network that bends its input and looks at the time; x is [..., 5]."""
    return jnp.tanh(point.scale * x @ MIX + point.time / 1000 * TILT)


def torch_toy(x, time):
    return torch.tanh(x @ torch.from_numpy(MIX).double() + time / 1000 * torch.from_numpy(TILT))


class Double:
    """The torch that a scheduler's step sees: so that what error there is, is ours.

    In float32 diffusers' Euler loses five digits at zero SNR, where x is 4096 times the noise.
    """

    float32 = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


def keys_of(*seeds):
    return jax.vmap(jax.random.key)(jnp.array(seeds))


KEYS = keys_of(3, 4)
STEPS = ("ddim", "ddpm", "dpmpp", "pndm", "lcm")  # Euler and its ancestral form take DDIM's


def keys_for(sampler, eta=0.0):
    return KEYS if eta or SAMPLERS[sampler].stochastic else None


@cache
def jitted(step):
    return jax.jit(lambda state, point, keys: step(toy, state, point, keys))


@jax.jit
def drawn(index):
    """What the keys of the run draw at a step."""
    return jax.vmap(lambda k: jax.random.normal(jax.random.fold_in(k, index), SHAPE[1:]))(KEYS)


def row(points, i):
    return jax.tree.map(lambda field: field[i], points)


def begin(sampler, x):
    return State(x, SAMPLERS[sampler].memory(x))


def ours(schedule, steps, start=0, eta=0.0):
    """Every state of a run of ours: [the noisy beginning, after step 1, ...]."""
    points, initial, length = grid(schedule, steps, start, eta)
    rows = [row(points, i) for i in range(start, length)]
    x = initial * NOISE if start == 0 else rows[0].signal * CLEAN + rows[0].noise * NOISE
    keys = keys_for(schedule.sampler, eta)
    states = [begin(schedule.sampler, jnp.asarray(x, jnp.float32))]
    for point in rows:
        states.append(jitted(SAMPLERS[schedule.sampler].step)(states[-1], point, keys))
    return np.stack([state.x for state in states])


def theirs(schedule, config, steps, start=0, eta=0.0):
    """The same of diffusers, fed the noise that our keys draw."""
    name = KINDS[schedule.sampler].name
    scheduler = getattr(diffusers, name).from_config(config)
    scheduler.set_timesteps(steps)
    times = scheduler.timesteps[start:]
    if hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    if start == 0:
        x = torch.from_numpy(NOISE) * scheduler.init_noise_sigma
    else:
        x = scheduler.add_noise(torch.from_numpy(CLEAN), torch.from_numpy(NOISE), times[:1])

    x, options = x.double(), {"eta": eta} if eta else {}
    if hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    module, states = importlib.import_module(type(scheduler).__module__), [x]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "torch", Double())
        for i, time in enumerate(times):
            if hasattr(module, "randn_tensor"):
                noise = torch.from_numpy(np.array(drawn(i)))
                patch.setattr(module, "randn_tensor", lambda *_, noise=noise, **__: noise)
            prediction = torch_toy(scheduler.scale_model_input(x, time), time)
            x = scheduler.step(prediction, time, x, **options).prev_sample
            states.append(x)
    return torch.stack(states).numpy()


def worst(sampler, steps, start=0, eta=0.0, **changes):
    """The largest error of any state of a run."""
    config = STABLE_DIFFUSION | {"_class_name": KINDS[sampler].name} | changes
    schedule = Schedule.read(config, None, "test")
    actual = ours(schedule, steps, start, eta)
    expected = theirs(schedule, config, steps, start, eta)
    return max(map(error, actual, expected[: len(actual)]))


def combinations():
    """Every sampler, spacing, prediction type, zero SNR and Karras that diffusers accepts."""
    for sampler, kind in KINDS.items():
        if sampler == "edict":  # diffusers has no such step; see tests/seedselect/test_gradient.py
            continue
        spacings = SPACINGS if sampler != "lcm" else ("leading",)  # it looks at none of them
        predictions = PREDICTIONS[:2] if sampler in ("pndm", "euler_a") else PREDICTIONS
        zeros = (False, True) if "rescale_betas_zero_snr" in kind.fields else (False,)
        karras = (False, True) if "use_karras_sigmas" in kind.fields else (False,)
        for combination in itertools.product(spacings, predictions, zeros, karras):
            spacing, prediction, zero, _ = combination
            reaches_zero = zero and (spacing != "leading" or sampler == "lcm")
            if reaches_zero and prediction == "epsilon" and sampler in ("ddim", "ddpm", "lcm"):
                continue  # 0 / 0; refused, see test_schedule.py
            yield sampler, *combination


@pytest.mark.parametrize(("sampler", "spacing", "prediction", "zero", "karras"), [*combinations()])
def test_every_state_of_a_run_is_that_of_diffusers(sampler, spacing, prediction, zero, karras):
    for steps, start in [(1, 0), (2, 0), (3, 1), (5, 2), (20, 7), (50, 0)]:
        changes = {
            "timestep_spacing": spacing,
            "prediction_type": prediction,
            "rescale_betas_zero_snr": zero,
            "use_karras_sigmas": karras,
        }
        assert worst(sampler, steps, start, **changes) <= 1e-5, (steps, start)


@pytest.mark.parametrize(
    ("sampler", "changes"),
    [
        *itertools.product(
            ("ddim", "ddpm", "lcm"),
            [
                {"clip_sample": True},
                {"clip_sample": True, "clip_sample_range": 2.5, "prediction_type": "v_prediction"},
                {"beta_schedule": "linear", "beta_end": 0.02},
                {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 200},
                {
                    "trained_betas": np.linspace(0.001, 0.02, 300).tolist(),
                    "num_train_timesteps": 300,
                },
            ],
        ),
        *itertools.product(
            ("ddim", "pndm"), [{"set_alpha_to_one": True}, {"steps_offset": 0}, {"steps_offset": 3}]
        ),
        *itertools.product(
            ("euler", "dpmpp"),
            [
                {"final_sigmas_type": "sigma_min"},
                {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
                {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True},
            ],
        ),
        ("dpmpp", {"final_sigmas_type": "sigma_min", "lower_order_final": False}),
        ("dpmpp", {"final_sigmas_type": "sigma_min", "euler_at_final": True}),
        ("dpmpp", {"solver_order": 1}),
        ("lcm", {"original_inference_steps": 25, "timestep_scaling": 2.0}),
    ],
    ids=str,
)
def test_every_option_of_a_schedule_acts_as_in_diffusers(sampler, changes):
    for steps, start in [(4, 0), (14, 3), (15, 0)]:
        assert worst(sampler, steps, start, **changes) <= 1e-5, (steps, start)


@pytest.mark.parametrize("eta", [0.3, 1.0])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_eta_adds_the_noise_that_diffusers_adds(spacing, eta):
    assert worst("ddim", 20, eta=eta, timestep_spacing=spacing) <= 1e-5
    assert worst("ddim", 7, start=2, eta=eta, timestep_spacing=spacing, clip_sample=True) <= 1e-5


@pytest.mark.parametrize("sampler", ["ddim", "euler", "dpmpp", "pndm"])
def test_a_run_has_the_steps_asked_for_where_diffusers_runs_a_stray_one(sampler):
    # 1000 / 61 rounds so that numpy.arange gives 62 values; diffusers ends on timestep -1.
    scheduler = getattr(diffusers, KINDS[sampler].name)(
        timestep_spacing="trailing", **({"skip_prk_steps": True} if sampler == "pndm" else {})
    )
    scheduler.set_timesteps(61)
    assert scheduler.timesteps[-1] == -1

    schedule = Schedule(sampler=sampler, timestep_spacing="trailing")
    assert grid(schedule, 61).length == 61 + (sampler == "pndm")
    assert np.isfinite(ours(schedule, 61)).all()


# EDICT's second latent reads an eps of the step before: its steps are exact where they are short.
@pytest.mark.parametrize("sampler", [*filter(lambda sampler: sampler != "edict", KINDS)])
def test_a_perfect_network_leads_any_sampler_to_the_only_image(sampler):
    schedule = Schedule(sampler=sampler, set_alpha_to_one=True)
    points, initial, length = grid(schedule, 10)

    def perfect(x, point):
        return (x - point.signal * CLEAN) / point.noise

    state = begin(sampler, initial * jnp.asarray(NOISE))
    state = walk(SAMPLERS[sampler].step, perfect, state, points, 0, length, keys_for(sampler))
    if sampler == "lcm":  # its boundary scaling keeps a little of x
        np.testing.assert_allclose(state.x, CLEAN, atol=1e-4)
    else:
        np.testing.assert_allclose(state.x, CLEAN, atol=2e-6)


def test_ancestral_euler_serves_networks_that_predict_the_clean_image():
    # diffusers has no form for it; one step to sigma 0 is the prediction itself
    schedule = Schedule(sampler="euler_a", prediction_type="sample")
    states = ours(schedule, 1)
    point = row(grid(schedule, 1).points, 0)
    np.testing.assert_allclose(states[1], toy(states[0], point), rtol=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_ancestral_euler_of_the_clean_image_has_the_closed_form(spacing):
    """k-diffusion's: down by Euler's step to less than the next sigma, and up to it by noise."""
    schedule = Schedule(sampler="euler_a", prediction_type="sample", timestep_spacing=spacing)
    points, _, length = grid(schedule, 5)
    states = ours(schedule, 5).astype(np.float64)
    rows = [row(points, i) for i in range(length)]
    sigmas = [float(r.noise / r.signal) for r in rows] + [0.0]
    for i, (before, after) in enumerate(itertools.pairwise(sigmas)):
        x = states[i]  # the image with noise of sigma added
        clean = np.asarray(toy(states[i].astype(np.float32), rows[i]), np.float64)
        up = after * np.sqrt(1 - (after / before) ** 2)
        x = x + (x - clean) / before * (np.sqrt(after**2 - up**2) - before)
        x = x + up * np.asarray(drawn(i), np.float64)
        assert error(states[i + 1], x) < 1e-5


@pytest.mark.parametrize("sampler", STEPS)
def test_walk_and_unroll_and_a_python_loop_agree(sampler):
    schedule, step = Schedule(sampler=sampler), SAMPLERS[sampler].step
    points, initial, length = grid(schedule, 6, start=2)
    state = begin(sampler, initial * jnp.asarray(NOISE))
    run = jax.tree.map(lambda f: f[2:], points)

    def after(x, point):
        return x + point.noise_next * CLEAN

    looped = state
    for i in range(2, length):
        looped = jitted(step)(looped, row(points, i), keys_for(sampler))
        looped = looped._replace(x=after(looped.x, row(points, i)))
    walked = jax.jit(
        lambda s: walk(step, toy, s, pad(points), 2, length, keys_for(sampler), after)
    )(state)
    unrolled = jax.jit(lambda s: unroll(step, toy, s, run, keys_for(sampler), after))(state)

    assert error(walked.x, looped.x) < 1e-6
    assert error(unrolled.x, looped.x) < 1e-6


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "pndm", "lcm"])
def test_one_compilation_serves_every_number_of_steps(sampler):
    traces = []

    def counted(x, point):
        traces.append(point)
        return toy(x, point)

    @jax.jit
    def run(x, points, start, stop):
        step = SAMPLERS[sampler].step
        return walk(step, counted, begin(sampler, x), points, start, stop, keys_for(sampler)).x

    for steps, start in [(1, 0), (4, 2), (30, 25)]:
        points, _, length = grid(Schedule(sampler=sampler), steps, start)
        actual = run(jnp.asarray(NOISE), pad(points), start, length)
        expected = begin(sampler, jnp.asarray(NOISE))
        for i in range(start, length):
            expected = jitted(SAMPLERS[sampler].step)(expected, row(points, i), keys_for(sampler))
        assert error(actual, expected.x) < 1e-6
    assert len(traces) == 1


def test_an_images_noise_depends_on_its_own_key_alone():
    points = grid(Schedule(sampler="ddpm"), 3).points

    def run(x, keys):
        return unroll(SAMPLERS["ddpm"].step, toy, State(x, ()), points, keys).x

    def run_alone(x, key):
        return run(x[None], key[None])[0]

    run_jitted = jax.jit(run)
    together = run_jitted(NOISE, KEYS)
    assert error(run_jitted(NOISE[::-1], KEYS[::-1]), together[::-1]) < 1e-6
    assert error(jax.jit(run_alone)(NOISE[1], KEYS[1]), together[1]) < 1e-6
    assert error(jax.jit(jax.vmap(run_alone))(NOISE, KEYS), together) < 1e-6
    assert error(run_jitted(NOISE, keys_of(5, 6)), together) > 0.1


def test_without_keys_and_without_eta_nothing_is_drawn():
    points = grid(Schedule(), 3).points
    state = begin("ddim", jnp.asarray(NOISE))

    def drawing(keys):
        program = jax.make_jaxpr(lambda: unroll(SAMPLERS["ddim"].step, toy, state, points, keys))()
        return "random_bits" in str(program)

    assert drawing(KEYS)
    assert not drawing(None)
    silent, asked = (unroll(SAMPLERS["ddim"].step, toy, state, points, k) for k in (None, KEYS))
    np.testing.assert_allclose(silent.x, asked.x, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["ddim", "dpmpp", "pndm", "lcm"])
def test_gradients_to_the_seed_are_those_of_finite_differences(sampler):
    schedule = Schedule(sampler=sampler, clip_sample=True, clip_sample_range=30.0)
    points, initial, _ = grid(schedule, 5)
    with jax.enable_x64(True):
        seed = jnp.asarray(NOISE, jnp.float64) * initial
        along = jnp.asarray(CLEAN, jnp.float64)

        @jax.jit
        def score(seed):
            state = unroll(
                SAMPLERS[sampler].step, toy, begin(sampler, seed), points, keys_for(sampler)
            )
            assert state.x.dtype == jnp.float64
            return jnp.sum(jnp.sin(state.x))

        slope = jnp.vdot(jax.grad(score)(seed), along)
        finite = (score(seed + 1e-6 * along) - score(seed - 1e-6 * along)) / 2e-6
        np.testing.assert_allclose(slope, finite, rtol=1e-6)


def test_a_gradient_through_more_steps_costs_latents_and_no_networks():
    wide = jnp.ones((5, 4096)) / 4096

    def network(x, point):
        return jnp.tanh(x @ wide) @ wide.T  # [..., 4096] inside: what a step must not leave behind

    def temporaries(steps):
        points = grid(Schedule(), steps).points

        def score(x):
            return unroll(SAMPLERS["ddim"].step, network, State(x, ()), points, None).x.sum()

        return jax.jit(jax.grad(score)).lower(NOISE).compile().memory_analysis().temp_size_in_bytes

    latent = NOISE.nbytes
    assert temporaries(40) - temporaries(20) <= 20 * 3 * latent
    assert temporaries(20) > latent // 5 * 4096


@pytest.mark.parametrize("sampler", STEPS)
def test_the_state_is_float32_whatever_the_network_computes_in(sampler):
    points = grid(Schedule(sampler=sampler), 3).points

    def half(x, point):
        return toy(x, point).astype(jnp.bfloat16)

    def rough(x, point):
        return x.astype(jnp.bfloat16)

    step, state = SAMPLERS[sampler].step, begin(sampler, jnp.asarray(NOISE, jnp.bfloat16))
    for end in (
        jax.eval_shape(lambda: unroll(step, half, state, points, keys_for(sampler))),
        jax.eval_shape(lambda: walk(step, half, state, points, 0, 2, keys_for(sampler), rough)),
    ):
        assert {leaf.dtype for leaf in jax.tree.leaves(end)} == {jnp.dtype("float32")}

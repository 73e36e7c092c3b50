"""Optimizers against torch.optim, transformers and closed forms."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import torch
import tyro
from diffusers.optimization import get_scheduler
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding
from transformers.optimization import Adafactor as TheirAdafactor

from jaxgen import sharding, trees
from jaxgen.training import optim
from jaxgen.training.optim import Adafactor, AdamW, Lion, Muon
from jaxgen.types import UserError
from tests.torch_oracle import error
from tests.training.test_muon import iterated

SHAPES = {"block/kernel": (3, 3, 4, 6), "block/bias": (6,), "out/kernel": (6, 5)}
STEPS = 10


def draw(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    flat = {p: scale * rng.standard_normal(s, np.float32) for p, s in SHAPES.items()}
    return trees.unflatten(flat)


PARAMS = draw(0)
GRADS = [draw(i + 1) for i in range(STEPS)]


def run(optimizer, params=PARAMS, grads=GRADS):
    """Parameters by path after one step for each of the gradients."""
    optim.check(optimizer, trees.flatten(params))
    transform = optim.build(optimizer, params, STEPS)
    params = jax.tree.map(jnp.asarray, params)
    state = transform.init(params)

    @jax.jit
    def step(params, state, grads):
        updates, state = transform.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    for gradient in grads:
        params, state = step(params, state, gradient)
    return trees.flatten(params)


def run_torch(make, schedule=None, clip=0.0, group=lambda path: {}):
    """The same by an optimizer of torch, each parameter in a group of its own."""
    flat = trees.flatten(PARAMS)
    params = {path: torch.nn.Parameter(torch.tensor(leaf)) for path, leaf in flat.items()}
    theirs = make([{"params": [p], **group(path)} for path, p in params.items()])
    rate = get_scheduler(schedule, theirs, None, 3, STEPS) if schedule else None
    for grads in GRADS:
        for path, gradient in trees.flatten(grads).items():
            params[path].grad = torch.tensor(gradient)
        if clip:
            torch.nn.utils.clip_grad_norm_(params.values(), clip)
        theirs.step()
        if rate:
            rate.step()
    return {path: p.detach().numpy() for path, p in params.items()}


def agree(ours, theirs, bound=1e-6):
    for path, start in trees.flatten(PARAMS).items():
        assert error(ours[path], theirs[path]) < bound, path
        assert error(ours[path] - start, theirs[path] - start) < 10 * bound, path


SCHEDULES = {"constant": "constant_with_warmup", "cosine": "cosine", "linear": "linear"}


# b2 is 0.99 below, for Optax computes 1 - b2^t in float32: of 0.999 with an error of 1e-5, in the
# first steps.
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_adamw_is_torchs(schedule):
    ours = AdamW(learning_rate=0.1, warmup=3, schedule=schedule, weight_decay=0.3, b2=0.99, clip=0)
    theirs = run_torch(
        lambda groups: torch.optim.AdamW(groups, 0.1, (0.9, 0.99), weight_decay=0.3),
        SCHEDULES[schedule],
    )
    agree(run(ours), theirs)


def test_clipping_is_torchs():
    # Torch divides by the norm + 1e-6, which is 1e-7 of it here; Adam must not hide the scale.
    ours = AdamW(learning_rate=0.1, clip=2.0, epsilon=1.0)
    theirs = run_torch(lambda groups: torch.optim.AdamW(groups, 0.1, eps=1.0), clip=2.0)
    agree(run(ours), theirs)
    assert error(run(dataclasses.replace(ours, clip=0.0))["out/kernel"], theirs["out/kernel"]) > 0.1
    small = [draw(7, 1e-3)]  # its norm, 0.016, is below
    clipped, free = run(ours, grads=small), run(dataclasses.replace(ours, clip=0.0), grads=small)
    assert all(np.array_equal(clipped[path], free[path]) for path in SHAPES)


def test_rates_and_decay_by_path_are_torchs_groups():
    ours = AdamW(
        learning_rate=0.1,
        clip=0,
        b2=0.99,
        weight_decay=0.3,
        no_decay=("bias$", "^out"),
        rates=(("block/kernel", 0.25), ("^block", 0.5)),
    )
    groups = {
        "block/kernel": {"lr": 0.025},
        "block/bias": {"lr": 0.05, "weight_decay": 0.0},
        "out/kernel": {"weight_decay": 0.0},
    }
    theirs = run_torch(
        lambda g: torch.optim.AdamW(g, 0.1, (0.9, 0.99), weight_decay=0.3), group=groups.get
    )
    agree(run(ours), theirs)


@pytest.mark.parametrize("relative", [False, True])
def test_adafactor_is_transformers(relative):
    # Theirs factors the last two axes at any length; ours the longest two, here the same.
    ours = Adafactor(learning_rate=0.1, clip=0, weight_decay=0.3, smallest=1, relative=relative)
    theirs = run_torch(
        lambda groups: TheirAdafactor(
            groups, 0.1, scale_parameter=relative, relative_step=False, weight_decay=0.3
        )
    )
    agree(run(ours), theirs, 2e-6)


def test_adafactor_keeps_rows_and_columns_of_large_parameters_alone():
    params = {"large": jnp.ones((3, 3, 128, 256)), "small": jnp.ones((64, 64))}
    state = jax.eval_shape(optim.build(Adafactor(), params, STEPS).init, params)
    assert trees.size(state) < 9 * (128 + 256) + 64 * 64 + 10


def test_lion_is_its_closed_form():
    """Chen et al. 2023, algorithm 2."""
    ours = run(Lion(learning_rate=0.01, clip=0, weight_decay=0.5, b1=0.8, b2=0.9))
    for path, value in trees.flatten(PARAMS).items():
        value, mean = value.astype(np.float64), 0.0
        for grads in GRADS:
            gradient = trees.flatten(grads)[path].astype(np.float64)
            value = value - 0.01 * (np.sign(0.8 * mean + 0.2 * gradient) + 0.5 * value)
            mean = 0.9 * mean + 0.1 * gradient
        assert error(ours[path], value) < 1e-6


def test_muon_is_its_closed_form_for_kernels_and_adamw_for_the_rest():
    """With Nesterov's momentum, its start corrected as Adam's is, and 0.2 sqrt(max(in, out))."""
    rest = {"learning_rate": 0.01, "clip": 0, "weight_decay": 0.5, "b2": 0.99}
    ours, adam = run(Muon(beta=0.9, **rest)), run(AdamW(**rest))
    assert np.array_equal(ours["block/bias"], adam["block/bias"])
    for path in ("block/kernel", "out/kernel"):
        start = trees.flatten(PARAMS)[path].astype(np.float64)
        value, mean = start.reshape(-1, start.shape[-1]), 0.0
        for t, grads in enumerate(GRADS, 1):
            gradient = trees.flatten(grads)[path].astype(np.float64).reshape(value.shape)
            mean = 0.9 * mean + 0.1 * gradient
            ahead = 0.9 * mean / (1 - 0.9 ** (t + 1)) + 0.1 * gradient / (1 - 0.9**t)
            step = 0.2 * max(value.shape) ** 0.5 * iterated(ahead)
            value = value - 0.01 * (step + 0.5 * value)
        assert error(ours[path], value.reshape(start.shape)) < 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("warmup", [0, 7, 30])
def test_schedules_are_those_of_diffusers(schedule, warmup):
    parameter = torch.nn.Parameter(torch.zeros(1))
    sgd = torch.optim.SGD([parameter], 0.5)
    theirs = get_scheduler(SCHEDULES[schedule], sgd, None, warmup, 20)
    ours = optim.rate(AdamW(learning_rate=0.5, warmup=warmup, schedule=schedule), 20)
    for step in range(20):
        expected = theirs.get_last_lr()[0]
        assert float(ours(step)) == pytest.approx(expected, abs=1e-15), step
        assert float(jax.jit(ours)(step)) == pytest.approx(expected, abs=1e-7), step
        sgd.step()
        theirs.step()


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_a_schedule_ends_at_its_final_fraction_and_stays(schedule):
    rate = optim.rate(AdamW(learning_rate=0.5, warmup=2, schedule=schedule, final=0.1), 12)
    assert [float(rate(i)) for i in (2, 7, 12, 99)] == pytest.approx([0.5, 0.275, 0.05, 0.05])


def test_what_a_pattern_freezes_is_known_and_stays():
    ours = AdamW(rates=(("block/kernel", 0.0), ("block", 2.0)))
    assert [optim.frozen(ours, path) for path in SHAPES] == [True, False, False]
    learned, _ = trees.split(PARAMS, lambda path: not optim.frozen(ours, path))
    state = optim.build(ours, learned, STEPS).init(learned)
    assert trees.size(state) == 2 * (6 + 6 * 5) + 2  # two moments and two counts
    assert np.array_equal(run(ours)["block/kernel"], PARAMS["block"]["kernel"])  # even if passed


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(relative=True), Lion(), Muon()])
def test_everything_is_float32_whatever_the_parameters_are(optimizer):
    low = lambda tree: jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), tree)  # noqa: E731
    params, grads = low(PARAMS), low(GRADS[0])
    transform = optim.build(optimizer, params, STEPS)
    state = transform.init(params)
    updates, after = transform.update(grads, state, params)
    kinds = {x.dtype for x in jax.tree.leaves((updates, state, after))}
    assert kinds == {jnp.dtype("float32"), jnp.dtype("int32")}
    applied = optax.apply_updates(params, updates)
    assert {x.dtype for x in jax.tree.leaves(applied)} == {jnp.dtype("bfloat16")}


@pytest.mark.parametrize("optimizer", [AdamW(), Adafactor(smallest=4), Lion(), Muon()])
def test_a_state_lives_where_its_parameters_do(optimizer):
    mesh = sharding.training_mesh(data=4, fsdp=2)
    whole = NamedSharding(mesh, PartitionSpec())
    where = sharding.layout(mesh)
    transform = optim.build(optimizer, PARAMS, STEPS)
    shapes = jax.eval_shape(transform.init, PARAMS)
    places = optim.shardings(shapes, PARAMS, where, whole)
    assert str(jax.tree.structure(places)) == str(jax.tree.structure(shapes))

    params = trees.map_with_path(lambda p, x: jax.device_put(x, where(p, x.shape)), PARAMS)
    state = jax.jit(transform.init, out_shardings=places)(params)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        like = [p for p in jax.tree.leaves(params) if p.shape == shape.shape and p.ndim > 1]
        assert leaf.sharding.is_equivalent_to(like[0].sharding if like else whole, leaf.ndim)
    split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state))
    assert split == {"AdamW": 4, "Lion": 2, "Muon": 2, "Adafactor": 0}[type(optimizer).__name__]

    # A step keeps it there, and computes what one device does.
    step = jax.jit(lambda *args: transform.update(*args)[0])
    alone = jax.tree.map(
        lambda x: jax.device_put(x, SingleDeviceSharding(jax.devices()[0])), PARAMS
    )
    spread, single = step(GRADS[0], state, params), step(GRADS[0], transform.init(alone), alone)
    for ours, theirs in zip(jax.tree.leaves(spread), jax.tree.leaves(single), strict=True):
        assert error(ours, theirs) < 1e-6


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"learning_rate": -1e-4}, "learning_rate = -0.0001 is not a number from 0"),
        ({"learning_rate": float("nan")}, "learning_rate = nan"),
        ({"learning_rate": "1e-4"}, "learning_rate = '1e-4'"),
        ({"warmup": -1}, "warmup = -1"),
        ({"clip": float("inf")}, "clip = inf"),
        ({"weight_decay": -0.1}, "weight_decay = -0.1"),
        ({"final": 1.5}, "final = 1.5 is not a number from 0 to 1"),
        ({"b2": 1.0}, "b2 = 1.0 is not a number from 0 to below 1"),
        ({"schedule": "polynomial"}, "'polynomial' is not one of constant, cosine, linear"),
        ({"no_decay": "bias"}, "no_decay = 'bias' is not a tuple"),
        ({"no_decay": ("(",)}, "no_decay: '\\(' is not a regular expression"),
        ({"rates": ("bias", 0.1)}, "rates = .* is not of pairs"),
        ({"rates": (("*", 0.1),)}, "rates: '\\*' is not a regular expression"),
        ({"rates": (("bias", -1.0),)}, "rates: factor -1.0 of 'bias'"),
        ({"rates": (("bias", "fast"),)}, "rates: factor 'fast' of 'bias'"),
    ],
)
def test_a_bad_value_is_refused_in_one_line(fields, words):
    with pytest.raises(UserError, match=words) as caught:
        AdamW(**fields)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"no_decay": ("biass",)}, "no_decay: 'biass' fits no parameter, such as block/kernel"),
        ({"rates": (("kernal", 0.0),)}, "rates: 'kernal' fits no parameter"),
        ({"rates": (("block", 1.0), ("block/bias", 0.0))}, "rates: 'block/bias' fits no"),
        ({"rates": (("", 1.0), ("block", 0.0))}, "rates: 'block' .*; none is left for it"),
    ],
)
def test_a_pattern_that_decides_nothing_is_refused(fields, words):
    with pytest.raises(UserError, match=words):
        optim.check(AdamW(**fields), trees.flatten(PARAMS))


def test_every_field_is_a_flag_with_its_own_help(capsys):
    flags = "--learning-rate 0.3 --rates a 0.1 ^b$ 0 --no-decay bias scale --schedule linear"
    assert tyro.cli(AdamW, args=flags.split()) == AdamW(
        learning_rate=0.3,
        rates=(("a", 0.1), ("^b$", 0.0)),
        no_decay=("bias", "scale"),
        schedule="linear",
    )
    for kind in (AdamW, Adafactor, Lion, Muon):
        with pytest.raises(SystemExit):
            tyro.cli(kind, args=["--help"])
        said = capsys.readouterr().out
        assert "Rate after the warmup" in said
        assert all(f"--{f.name.replace('_', '-')}" in said for f in dataclasses.fields(kind))

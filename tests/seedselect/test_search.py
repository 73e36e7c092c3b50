"""The loop of a search: AdamW, the best kept, seeds that do not meet, and those that are done."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from jaxgen import sharding
from jaxgen.diffusion import shell
from jaxgen.seedselect import search
from jaxgen.seedselect.search import Search
from jaxgen.types import UserError
from tests.seedselect import toys
from tests.torch_oracle import error


def go(program, run, seeds, stops):
    """The states after each of `stops` iterations."""
    state, states = search.begin(seeds), []
    for stop in stops:
        state = search.improve(toys.PARAMS, run, state, np.int32(stop), program=program)
        states.append(state)
    return states


def test_seeds_move_as_by_adamw_of_pytorch():
    """The rate falls to a tenth at iteration 3; decay is PyTorch's default."""
    program, seeds = toys.program(), toys.seeds(2)
    run = toys.run(seeds)
    moved = torch.from_numpy(seeds.copy()).requires_grad_()
    optimizer = torch.optim.AdamW([moved], lr=0.1)
    for i, state in enumerate(go(program, run, seeds, range(1, 8))):
        at = jnp.asarray(moved.detach().numpy())
        slopes, (look, _) = search.gradient(toys.PARAMS, run, at, program=program)
        optimizer.param_groups[0]["lr"] = 0.1 if i < 3 else 0.01
        moved.grad = torch.from_numpy(np.array(slopes))
        optimizer.step()
        assert error(state.seen.loss, look.loss) < 1e-5
        assert error(state.seeds, moved.detach().numpy()) < 1e-4


def test_the_best_seed_is_kept_and_not_the_last():
    program, seeds = toys.program(), toys.seeds(3)
    run = toys.run(seeds, learning_rate=3.0, settle=100, patience=100)
    states = go(program, run, seeds, range(1, 16))
    losses = np.stack([state.seen.loss for state in states])
    assert (losses.argmin(0) < 14).any()  # at such a rate the last is not the best
    np.testing.assert_array_equal(states[-1].look.loss, losses.min(0))
    latents = search.last_latents(toys.PARAMS, run, states[-1].best, program=program)[-1]
    assert error(states[-1].latents, latents) < 1e-5
    _, (again, _) = search.gradient(toys.PARAMS, run, states[-1].best, program=program)
    for one, other in zip(again, states[-1].look, strict=True):
        assert error(one, other) < 1e-5


def test_what_a_loss_is_made_of_is_kept():
    program, seeds = toys.program(), toys.seeds(3)
    state = go(program, toys.run(seeds), seeds, [5])[0]
    look, flat = state.look, np.asarray(state.best).reshape(3, -1)
    assert error(look.loss, 0.8 * look.meaning + 0.2 * look.appearance) < 1e-6
    assert error(look.appearance, (np.asarray(state.latents) ** 2).mean((1, 2, 3))) < 1e-5
    assert error(look.norm, np.linalg.norm(flat, axis=1) / np.sqrt(24)) < 1e-6


def test_one_call_or_many_is_the_same():
    program, seeds = toys.program(), toys.seeds(2)
    run = toys.run(seeds)
    many, once = go(program, run, seeds, range(1, 7))[-1], go(program, run, seeds, [6])[0]
    jax.tree.map(np.testing.assert_array_equal, many, once)


def test_seeds_of_a_batch_do_not_meet():
    program, seeds = toys.program(), toys.seeds(5)
    run = toys.run(seeds)
    together = go(program, run, seeds, [8])[0]
    for i in range(5):
        given = jax.tree.map(lambda leaf: leaf[i : i + 1], run.given)  # noqa: B023
        alone = go(program, run._replace(given=given), seeds[i : i + 1], [8])[0]
        assert error(alone.best[0], together.best[i]) < 1e-5
        assert error(alone.look.loss[0], together.look.loss[i]) < 1e-5


def test_seeds_spread_over_devices_are_the_same():
    program, seeds = toys.program(), toys.seeds(8)
    run = toys.run(seeds)
    mesh = sharding.data_mesh(8)
    spread = run._replace(
        given=sharding.split_batch(run.given, mesh), points=sharding.replicate(run.points, mesh)
    )
    one = go(program, run, seeds, [5])[0]
    many = go(program, spread, sharding.split_batch(seeds, mesh), [5])[0]
    assert len(many.best.sharding.device_set) == 8
    assert error(many.best, one.best) < 1e-5


def test_a_seed_that_is_good_enough_is_left_alone():
    seeds = toys.seeds(3)
    run = toys.run(seeds)
    free = np.stack([s.seen.loss for s in go(toys.program(), run, seeds, range(1, 13))])
    target = float(np.sort(free[3])[0] + 1e-6)  # what one of them reaches in the fourth iteration
    states = go(toys.program(), toys.run(seeds, target=target), seeds, range(1, 13))
    (first,) = np.nonzero(~np.asarray(states[3].active))
    assert len(first) == 1
    for state in states[4:]:
        np.testing.assert_array_equal(state.seeds[first], states[3].seeds[first])
        np.testing.assert_array_equal(state.best[first], states[3].best[first])
    rest = np.setdiff1d(np.arange(3), first)
    assert error(states[5].seen.loss[rest], free[5][rest]) < 1e-6  # the others go on as before
    everyone = go(toys.program(), toys.run(seeds, target=100.0), seeds, [12])[0]
    assert int(everyone.iteration) == 1  # the loop ends with the last seed


def test_patience_ends_a_search_without_gain():
    seeds = toys.seeds(2)
    run = toys.run(seeds, learning_rate=0.0, patience=3)
    state = go(toys.program(), run, seeds, [50])[0]
    assert int(state.iteration) == 4  # the first look is a gain, three are not
    np.testing.assert_array_equal(state.best, seeds)


def test_a_truncated_gradient_takes_the_first_steps_as_they_are():
    """It is the gradient at the cut, of the run's own loss."""
    seeds = toys.seeds(2)
    run, whole, cut = toys.run(seeds), toys.program(), toys.program(truncate=2)
    slopes, (look, _) = search.gradient(toys.PARAMS, run, seeds, program=cut)
    _, (expected, _) = search.gradient(toys.PARAMS, run, seeds, program=whole)
    assert error(look.loss, expected.loss) < 1e-6
    head, tail = (jax.tree.map(lambda f, part=part: f[part], run.points) for part in HALVES)
    first = search.samplers.State(seeds, ())
    step, denoise = search.samplers.ddim, lambda x, p: toys.Denoiser().apply({}, x, p, {}, [])
    middle = search.samplers.unroll(step, denoise, first, head, None).x
    at_cut, _ = search.gradient(toys.PARAMS, run._replace(points=tail), middle, program=whole)
    assert error(slopes, at_cut) < 1e-5


HALVES = slice(0, 2), slice(2, None)


def test_a_norm_prior_holds_seeds_on_the_shell():
    seeds = 1.3 * toys.seeds(4)
    free, held = (
        go(toys.program(), toys.run(seeds, prior=p), seeds, [30])[0].seeds for p in (0.0, 0.1)
    )
    off = [np.abs(np.linalg.norm(s.reshape(4, -1), axis=1) - np.sqrt(23)) for s in (free, held)]
    assert off[1].max() < off[0].max()
    assert shell.log_prior(jnp.sqrt(23.0), 24) > shell.log_prior(jnp.sqrt(30.0), 24)


def test_edict_takes_part():
    program, seeds = toys.program("edict"), toys.seeds(2)
    states = go(program, toys.run(seeds, "edict"), seeds, range(1, 9))
    assert (np.asarray(states[-1].look.loss) < np.asarray(states[0].seen.loss)).all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"iterations": 0}, "iterations = 0"),
        ({"iterations": 2.5}, "iterations = 2.5"),
        ({"weight": 1.5}, "weight = 1.5"),
        ({"weight": float("nan")}, "weight = nan"),
        ({"distance": "near"}, "'near'"),
        ({"tail": ()}, "tail"),
        ({"target": float("inf")}, "target = inf"),
        ({"truncate": -1}, "truncate = -1"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, words):
    with pytest.raises(UserError) as found:
        Search(**options)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_numbers_of_a_search_compile_nothing():
    seeds = toys.seeds(2)
    go(toys.program(), toys.run(seeds), seeds, [1])
    before = search.compiled()._cache_size()
    go(toys.program(), toys.run(seeds, target=0.1, patience=2, learning_rate=1.0), seeds, [7])
    assert search.compiled()._cache_size() == before


@pytest.mark.parametrize(
    ("truncate", "expected"), [(0, (0.5, 0.3, 0.2)), (2, (0.6, 0.4)), (1, (1.0,))]
)
def test_the_tail_is_of_steps_that_get_a_gradient(truncate, expected):
    search = Search(tail=(0.5, 0.3, 0.2), truncate=truncate)
    assert search.tail_of(4) == pytest.approx(expected)

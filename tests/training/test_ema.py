"""The moving average against diffusers' EMAModel."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.training_utils import EMAModel

from jaxgen.training import ema
from jaxgen.training.ema import EMA
from jaxgen.types import UserError
from tests.torch_oracle import error

KINDS = [
    EMA(),
    EMA(decay=0.9),
    EMA(decay=0.0),
    EMA(start=50),
    EMA(warmup=True),
    EMA(warmup=True, power=3 / 4),
    EMA(warmup=True, power=1.0, gamma=10.0, decay=0.8, start=7),
]


def diffusers(kind, parameters):
    return EMAModel(
        parameters,
        decay=kind.decay,
        update_after_step=kind.start,
        use_ema_warmup=kind.warmup,
        inv_gamma=kind.gamma,
        power=kind.power,
    )


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_decay_is_that_of_diffusers_at_every_step(kind):
    theirs = diffusers(kind, [])
    steps = jnp.arange(201)
    ours = jax.jit(lambda step: ema.decay_at(kind, step))(steps)
    expected = np.array([theirs.get_decay(int(step)) for step in steps])
    np.testing.assert_allclose(ours, expected, rtol=0, atol=2e-7)


def test_a_decay_close_to_one_keeps_its_distance():
    """In float32 0.9999 is 1 - 1.00017e-4; an average would be fed that much too fast."""
    average = ema.update(EMA(), {"w": jnp.zeros(())}, {"w": jnp.ones(())}, jnp.int32(10**6))
    assert float(average["w"]) == pytest.approx(1e-4, rel=1e-6)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_average_is_that_of_diffusers(kind):
    rng = np.random.default_rng(0)
    walk = np.cumsum(rng.standard_normal((61, 4, 3)), 0, dtype=np.float32)
    parameter = torch.nn.Parameter(torch.tensor(walk[0]))
    theirs, ours = diffusers(kind, [parameter]), ema.init({"w": jnp.asarray(walk[0])})
    update = jax.jit(lambda *args: ema.update(kind, *args))
    for step in range(1, len(walk)):
        parameter.data = torch.tensor(walk[step])
        theirs.step([parameter])
        ours = update(ours, {"w": jnp.asarray(walk[step])}, jnp.int32(step))
        assert error(ours["w"], theirs.shadow_params[0]) < 2e-6


def test_before_its_start_the_average_is_the_parameters():
    learned = {"w": jnp.float32(0.1)}
    average = ema.update(EMA(start=5), {"w": jnp.float32(1e8)}, learned, jnp.int32(6))
    assert average["w"] == learned["w"]  # to the bit, as no blend would give it


def test_what_stands_still_is_left_to_the_bit():
    learned = {"w": jnp.asarray(np.random.default_rng(0).standard_normal(100), jnp.float32)}
    average = ema.update(EMA(), learned, learned, jnp.int32(777))
    assert np.array_equal(average["w"], learned["w"])


def test_averages_are_float32_copies():
    learned = {"w": jnp.ones(3, jnp.bfloat16), "v": jnp.ones(3)}
    average = ema.init(learned)
    assert {leaf.dtype for leaf in average.values()} == {jnp.dtype("float32")}
    after = ema.update(EMA(), average, learned, jnp.int32(1))
    assert {leaf.dtype for leaf in after.values()} == {jnp.dtype("float32")}

    def both(learned, average):
        return jax.tree.map(lambda x: x + 1, (learned, average))

    jax.jit(both, donate_argnums=(0, 1))(learned, average)  # fails on a shared buffer


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"decay": 1.0}, "decay"), ({"start": -1}, "start"), ({"power": 0.0}, "power")],
)
def test_bad_values_are_refused(fields, words):
    with pytest.raises(UserError, match=words):
        EMA(**fields)

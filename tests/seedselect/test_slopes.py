"""Scores whose slopes come along: the same numbers and gradients, and nothing computed twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import flops
from jaxgen.seedselect.slopes import with_slopes

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 5, 2))
HELD = {"weights": RNG.normal(size=(2, 6)), "aim": RNG.normal(size=(3, 6)), "power": np.int32(2)}
ROWS = np.arange(1.0, 4)


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


def score(x, held):
    seen = jnp.tanh(x.mean((1, 2)) @ held["weights"])
    return ((seen - held["aim"]) ** held["power"]).sum(-1) * jnp.exp(-jnp.square(x).mean((1, 2, 3)))


def plainly(score):
    return score


def direct(f):
    return f


def mapped(f):
    return lambda x, held: jax.lax.map(lambda x: f(x, held), x[None])[0]


@pytest.mark.parametrize("form", [direct, jax.jit, mapped])
def test_numbers_and_gradients_are_the_same(form):
    def seen(wrap):
        f = form(wrap(score))
        first = jax.grad(lambda x, held: ROWS @ f(x, held))
        second = jax.grad(lambda x, held: jnp.square(first(x, held)).sum())
        return f(X, HELD), first(X, HELD), second(X, HELD)

    for one, two in zip(seen(with_slopes), seen(plainly), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)


def test_mapped_over_more_it_is_the_same():
    xs = RNG.normal(size=(4, *X.shape))
    aims = RNG.normal(size=(4, 3, 6))

    def slopes(wrap):
        one = lambda x, aim: wrap(score)(x, HELD | {"aim": aim}) @ ROWS  # noqa: E731
        return jax.grad(lambda xs: jax.vmap(one)(xs, aims).sum())(xs)

    np.testing.assert_allclose(slopes(with_slopes), slopes(plainly), rtol=1e-12, atol=1e-14)


def test_a_gradient_costs_the_score_once():
    def seen(wrap):
        slope = jax.grad(lambda x: mapped(wrap(score))(x, HELD).sum())
        return flops.count(slope, X)

    assert seen(with_slopes) == seen(plainly) < seen(jax.checkpoint)


def test_what_it_reads_has_no_gradient():
    with pytest.raises(TypeError, match="latents alone"):
        jax.grad(lambda held: with_slopes(score)(X, held).sum(), allow_int=True)(HELD)

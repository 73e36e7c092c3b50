"""Scores whose slopes come along: the same numbers and gradients, and nothing computed twice."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgen import flops
from jaxgen.seedselect.along import along

RNG = np.random.default_rng(0)
X = RNG.normal(size=(3, 4, 5, 2))
WEIGHTS = RNG.normal(size=(2, 6))
AIM = RNG.normal(size=(3, 6))


def score(x, weights=WEIGHTS):
    seen = jnp.tanh(x.mean((1, 2)) @ weights)
    return jnp.square(seen - AIM).sum(-1) * jnp.exp(-jnp.square(x).mean((1, 2, 3)))


def test_numbers_and_gradients_are_the_same():
    rows = jnp.arange(1.0, 4)
    with jax.enable_x64(True):
        for form in (lambda f: f, jax.jit, lambda f: lambda x: jax.lax.map(f, x[None])[0]):
            own = form(along(score))
            np.testing.assert_allclose(own(X), form(score)(X), rtol=1e-14)
            for order in (lambda g: g, lambda g: jax.grad(lambda x: jnp.square(g(x)).sum())):
                one, two = (order(jax.grad(lambda x, f=f: rows @ f(x)))(X) for f in (own, score))
                np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)


def test_mapped_over_more_it_is_the_same():
    xs = RNG.normal(size=(4, *X.shape))
    scales = jnp.arange(1.0, 5)

    def losses(wrap):
        def loss(xs):
            return jax.vmap(lambda x, scale: wrap(lambda x: score(scale * x))(x).sum())(xs, scales)

        return lambda xs: loss(xs).sum()

    with jax.enable_x64(True):
        one, two = (jax.grad(losses(wrap))(xs) for wrap in (along, lambda f: f))
    np.testing.assert_allclose(one, two, rtol=1e-12, atol=1e-14)


def test_a_gradient_costs_the_score_once():
    def work(wrap):
        def loss(x):
            return jax.lax.map(wrap(score), x[None]).sum()

        return flops.count(jax.grad(loss), X)

    with jax.enable_x64(True):
        assert work(along) == work(lambda f: f) < work(jax.checkpoint)


def test_what_it_reads_has_no_gradient():
    with jax.enable_x64(True), pytest.raises(TypeError, match="latents alone"):
        jax.grad(lambda weights: along(lambda x: score(x, weights))(X).sum())(WEIGHTS)

"""Muon's orthogonal matrices, against the iteration itself in float64, optax's, and the SVD."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from optax.contrib._muon import orthogonalize_via_newton_schulz

from jaxgen.training import muon
from tests.torch_oracle import error

SHAPES = [(24, 96), (96, 24), (24, 30), (24, 24), (160, 1440)]


def iterated(x):
    """Five iterations of Newton and Schulz, as written by Jordan et al. 2024."""
    x = x / np.linalg.norm(x)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (-4.775 * square + 2.0315 * square @ square) @ x
    return x


@pytest.fixture
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("shape", SHAPES)
def test_in_float64_it_is_the_iteration_and_optax_s(shape, x64):
    x = np.random.default_rng(0).standard_normal(shape)
    ours = muon.orthogonal(jnp.asarray(x))
    assert ours.dtype == "float64"
    assert error(ours, iterated(x)) < 1e-8  # 1e-8 is added to the norm
    theirs = orthogonalize_via_newton_schulz(jnp.asarray(x), jnp.asarray(muon.COEFFICIENTS))
    assert error(ours, theirs) < 1e-12


@pytest.mark.parametrize("least", [1.0, 1e-3, 1e-6, 0.0])
@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_grows_little_even_of_what_is_nearly_singular(shape, least):
    short = min(shape)
    rng = np.random.default_rng(0)
    left, _, right = np.linalg.svd(rng.standard_normal(shape), full_matrices=False)
    x = (left * np.maximum(np.geomspace(1, 1e-12, short), least)) @ right
    assert error(muon.orthogonal(jnp.asarray(x, jnp.float32)), iterated(x)) < 2e-4


def test_its_singular_values_are_near_one(x64):
    rng = np.random.default_rng(1)
    left, _, right = np.linalg.svd(rng.standard_normal((32, 64)), full_matrices=False)
    values = np.geomspace(1, 1e-4, 32)
    values /= np.linalg.norm(values)
    ours = np.asarray(muon.orthogonal(jnp.asarray((left * values) @ right)))
    product = left.T @ ours @ right.T  # the same singular vectors, so diagonal
    np.testing.assert_allclose(product, np.diag(np.diag(product)), atol=1e-10)
    found = np.diag(product)[values > 0.002]
    assert found.min() > 0.68
    assert found.max() < 1.21


def test_what_has_no_gradient_does_not_move():
    assert not np.asarray(muon.orthogonal(jnp.zeros((4, 8)))).any()

"""Seeds on the Gaussian shell: the density of norms, paths, centroids."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from jaxgen.diffusion import shell

SIZE = 256
SEEDS = np.random.default_rng(0).normal(size=(4, SIZE)).astype(np.float32)
KEY = jax.random.key(0)


def likelihood(points):
    """What a path maximises, in float64."""
    steps = np.linalg.norm(np.diff(points, axis=0), axis=1)
    middle = np.linalg.norm((points[1:] + points[:-1]) / 2, axis=1)
    return (steps * stats.chi.logpdf(middle, SIZE)).sum()


@pytest.mark.parametrize("size", [3, SIZE, 16384])
def test_density_of_the_norm_is_chi(size):
    norms = np.sqrt(size) + np.linspace(-1.5, 3, 13)
    found = np.asarray(shell.log_prior(jnp.asarray(norms, jnp.float32), size))
    np.testing.assert_allclose(found, stats.chi.logpdf(norms, size), rtol=1e-3, atol=1e-4)


def test_density_integrates_to_one():
    norms = np.linspace(10, 22, 400)
    density = np.exp(shell.log_prior(jnp.asarray(norms, jnp.float32), SIZE))
    assert abs(np.trapezoid(density, norms) - 1) < 1e-3


def test_a_path_stays_on_the_shell():
    path = np.asarray(jax.jit(shell.path, static_argnames="count")(SEEDS[0], SEEDS[1], KEY, 20))
    line = np.linspace(SEEDS[0], SEEDS[1], 20)
    np.testing.assert_array_equal(path[[0, -1]], SEEDS[:2])
    norms = np.linalg.norm(path, axis=1)
    assert np.abs(norms - np.sqrt(SIZE - 1)).max() < 2
    assert np.linalg.norm(line, axis=1).min() < 0.8 * np.sqrt(SIZE)
    assert likelihood(path) > likelihood(line)
    circle = np.stack([shell.between(SEEDS[0], SEEDS[1], s) for s in np.linspace(0, 1, 20)])
    assert likelihood(path) > likelihood(circle) - 1  # as good as the great circle, or better
    assert np.linalg.norm(np.diff(path, axis=0), axis=1).max() < 2.2 * np.linalg.norm(
        line[1] - line[0]
    )


def test_a_centroid_is_likely_and_between_all():
    middle, ways = map(np.asarray, jax.jit(shell.centroid, static_argnames="count")(SEEDS, KEY, 12))
    assert abs(np.linalg.norm(middle) - np.sqrt(SIZE - 1)) < 1.5
    for way, seed in zip(ways, SEEDS, strict=True):
        np.testing.assert_array_equal(way[0], middle)
        np.testing.assert_array_equal(way[-1], seed)
    cosines = SEEDS @ middle / np.linalg.norm(middle) / np.linalg.norm(SEEDS, axis=1)
    apart = SEEDS @ SEEDS.T / np.linalg.norm(SEEDS, axis=1) ** 2
    assert cosines.min() > np.abs(apart - np.eye(4)).max()


def test_points_of_a_great_circle_have_the_norms_between():
    one, two = SEEDS[0], 2 * SEEDS[1]
    for share in (0.0, 0.3, 1.0):
        found = np.linalg.norm(shell.between(one, two, share))
        expected = (1 - share) * np.linalg.norm(one) + share * np.linalg.norm(two)
        assert abs(found / expected - 1) < 1e-5
    np.testing.assert_allclose(shell.between(one, one, 0.4), one, rtol=1e-5)
    np.testing.assert_allclose(shell.between(one, two, 1.0), two, rtol=1e-5, atol=1e-5)

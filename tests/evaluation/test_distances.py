"""Distances of sets: closed forms, a matrix root of scipy, sums written out."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from jaxgen.evaluation.distances import fid, kid
from jaxgen.types import UserError


def exactly(mean, factor, rows, seed=0):
    """Rows [N, D] whose sample mean is just this, and whose covariance is factor^T factor."""
    x = np.random.default_rng(seed).standard_normal((rows, len(mean)))
    white, _ = np.linalg.qr(x - x.mean(0))  # orthonormal columns, each of mean 0
    return mean + np.sqrt(rows - 1) * white @ factor


def test_fid_of_diagonal_gaussians_is_that_of_their_deviations():
    means, deviations = np.array([[0, 1, 2], [3, 1, 0.5]]), np.array([[1, 2, 0.1], [4, 2, 0]])
    a, b = (exactly(m, np.diag(s), n) for m, s, n in zip(means, deviations, (9, 50)))
    wanted = np.square(means[0] - means[1]).sum() + np.square(deviations[0] - deviations[1]).sum()
    assert fid(a, b) == pytest.approx(wanted, rel=1e-12)


def test_fid_of_any_gaussians_is_that_of_the_matrix_root():
    rng = np.random.default_rng(0)
    means, factors = rng.standard_normal((2, 6)), rng.standard_normal((2, 6, 6))
    first, second = (factor.T @ factor for factor in factors)
    root = scipy.linalg.sqrtm(first @ second)
    wanted = np.square(means[0] - means[1]).sum() + np.trace(first + second - 2 * root)
    a, b = exactly(means[0], factors[0], 20), exactly(means[1], factors[1], 31, seed=3)
    assert fid(a, b) == pytest.approx(wanted, rel=1e-10)
    assert fid(b, a) == pytest.approx(wanted, rel=1e-10)


def test_fid_of_fewer_pictures_than_features():
    """In few of many features, the others constant, all is as in the few alone."""
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((40, 8)), 1 + 2 * rng.standard_normal((30, 8))
    turn, _ = np.linalg.qr(rng.standard_normal((300, 300)))
    wide = [np.pad(f, ((0, 0), (100, 192)), constant_values=0.5) @ turn for f in (a, b)]
    assert fid(*wide) == pytest.approx(fid(a, b), rel=1e-10)


def test_fid_of_a_set_to_itself_is_zero():
    a = np.random.default_rng(0).random((20, 32), np.float32)
    assert 0 <= fid(a, a[::-1]) < 1e-12


def slowly(x, y):
    """The unbiased estimate, term by term."""

    def k(p, q):
        return (sum(p * q) / len(p) + 1) ** 3

    def within(rows):
        pairs = list(itertools.permutations(rows, 2))
        return sum(k(p, q) for p, q in pairs) / len(pairs)

    across = [k(p, q) for p in x for q in y]
    return within(x) + within(y) - 2 * sum(across) / len(across)


def test_kid_is_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)), 0.5 + rng.standard_normal((7, 5))
    mean, deviation = kid(x, y, subsets=3, size=7)  # each subset is the whole
    assert mean == pytest.approx(slowly(x, y), rel=1e-12)
    assert deviation == pytest.approx(0, abs=1e-12)


def test_kid_is_of_every_pair_of_subsets_once_on_average():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((4, 3)), 0.5 + rng.standard_normal((3, 3))
    halves = [
        slowly(x[list(i)], y[list(j)])
        for i in itertools.combinations(range(4), 2)
        for j in itertools.combinations(range(3), 2)
    ]
    mean, deviation = kid(x, y, subsets=4000, size=2)
    assert abs(mean - slowly(x, y)) < 4 * np.std(halves) / np.sqrt(4000)
    assert deviation == pytest.approx(np.std(halves), rel=0.1)


def test_kid_is_the_same_for_a_seed_and_another_for_another():
    x, y = np.random.default_rng(0).standard_normal((2, 30, 4))
    assert kid(x, y) == kid(x, y, size=15) == kid(x, y, seed=0)
    assert kid(x, y) != kid(x, y, seed=1)


TABLE = np.ones((4, 3))


@pytest.mark.parametrize("distance", [fid, kid])
@pytest.mark.parametrize(
    "other",
    [TABLE[:1], TABLE[:0], TABLE[0], TABLE[:, :2], TABLE * np.nan],
    ids=["one row", "no row", "one axis", "narrower", "not finite"],
)
def test_features_that_cannot_be_compared_are_one_line(distance, other):
    for pair in ((TABLE, other), (other, TABLE)):
        with pytest.raises(UserError, match="features are"):
            distance(*pair)


@pytest.mark.parametrize("given", [{"size": 1}, {"size": 5}, {"subsets": 0}])
def test_subsets_that_cannot_be_are_one_line(given):
    with pytest.raises(UserError, match="subsets"):
        kid(TABLE, TABLE, **given)

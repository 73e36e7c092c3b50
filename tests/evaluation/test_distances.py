"""Distances of sets: closed forms, a matrix root of scipy, sums written out, sets drawn anew."""

import itertools

import numpy as np
import pytest
import scipy.linalg

from jaxgen.evaluation import distances
from jaxgen.evaluation.distances import fid, kid, kid_difference
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


def test_kid_is_the_sum_over_pairs(monkeypatch):
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((7, 5)), 0.5 + rng.standard_normal((9, 5))
    assert kid(x, y, resamples=2)[0] == pytest.approx(slowly(x, y), rel=1e-12)
    monkeypatch.setattr(distances, "AT_ONCE", 4)
    assert kid(x, y, resamples=2)[0] == pytest.approx(slowly(x, y), rel=1e-12)


def test_the_standard_error_is_the_spread_over_all_sets_that_can_be_drawn():
    """27 of three rows, 4 of two; those of one row alone have no pairs."""
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((3, 4)), 0.5 + rng.standard_normal((2, 4))
    found = []
    for i in itertools.product(range(3), repeat=3):
        for j in itertools.product(range(2), repeat=2):
            if len({*i}) > 1 and len({*j}) > 1:
                found.append(drawn(x[list(i)], y[list(j)]))
    assert kid(x, y, resamples=20_000)[1] == pytest.approx(np.std(found), rel=0.03)


def drawn(x, y):
    """The estimate, term by term, of rows some of which are the same."""

    def k(p, q):
        return (sum(p * q) / len(p) + 1) ** 3

    def within(rows):
        return np.mean([k(p, q) for p, q in itertools.permutations(rows, 2) if (p != q).any()])

    return within(x) + within(y) - 2 * np.mean([k(p, q) for p in x for q in y])


def gaussians(seed, rows=120):
    """Two sets in pairs, and one that they are compared with: means and spreads differ."""
    rng = np.random.default_rng(seed)
    a, c = rng.standard_normal((2, rows, 3))
    b = 0.9 * a + 0.4 * rng.standard_normal((rows, 3))
    return 0.8 + a, 0.4 + 1.2 * b, c


@pytest.mark.parametrize(
    "distance",
    [lambda a, b, c, n: kid(a, c, n), kid_difference],
    ids=["of one set", "of the difference"],
)
def test_standard_errors_are_the_spread_over_sets_drawn_anew(distance):
    anew = [distance(*gaussians(seed), 2)[0] for seed in range(600)]  # known to 3 %
    said = [distance(*gaussians(seed), 200)[1] for seed in range(1000, 1040)]
    assert np.sqrt(np.mean(np.square(said))) == pytest.approx(np.std(anew), rel=0.12)


def test_the_standard_error_of_sets_that_are_alike_is_too_large_but_not_by_much():
    alike = [np.random.default_rng(seed).standard_normal((2, 100, 3)) for seed in range(500)]
    anew = np.std([kid(a, b, 2)[0] for a, b in alike])
    said = np.sqrt(np.mean([kid(a, b, 200)[1] ** 2 for a, b in alike[:40]]))
    assert 0.9 * anew < said < 3**0.5 * 1.1 * anew


def test_the_difference_is_of_two_distances_and_surer_than_they_are():
    a, b, c = gaussians(0)
    one, other = kid(a, c), kid(b, c)
    difference, error = kid_difference(a, b, c)
    assert difference == pytest.approx(one[0] - other[0], rel=1e-10)
    assert error < np.hypot(one[1], other[1])
    assert kid_difference(b, a, c)[0] == pytest.approx(-difference, rel=1e-10)
    assert kid_difference(a, a, c) == (0, 0)


def test_kid_is_the_same_for_a_seed_and_its_error_another_for_another():
    x, y = np.random.default_rng(0).standard_normal((2, 30, 4))
    assert kid(x, y) == kid(x, y, seed=0)
    assert kid(x, y)[0] == kid(x, y, seed=1)[0]
    assert kid(x, y)[1] != kid(x, y, seed=1)[1]


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


def test_resamples_and_pairs_that_cannot_be_are_one_line():
    with pytest.raises(UserError, match="1 resamples have no spread"):
        kid(TABLE, TABLE, resamples=1)
    with pytest.raises(UserError, match="4 and 3 pictures are no pairs"):
        kid_difference(TABLE, TABLE[:3], TABLE)
    with pytest.raises(UserError, match="are both of one network"):
        kid_difference(TABLE, TABLE, TABLE[:, :2])

"""Where seeds start: near what is known, as long as noise is, and of their number alone."""

import itertools

import numpy as np
import pytest

from jaxgen.seedselect import starts

SEEDS = np.random.default_rng(0).standard_normal((3, 8, 8, 4)).astype(np.float32)


def cosine(one, other):
    return (one * other).sum() / np.linalg.norm(one) / np.linalg.norm(other)


@pytest.mark.parametrize("variety", [0, 0.3, 0.9, 1])
def test_a_start_near_a_seed_is_turned_and_as_long(variety):
    for number in range(5):
        start = starts.spread(SEEDS[:1], 7, number, variety)
        np.testing.assert_allclose(np.linalg.norm(start), np.linalg.norm(SEEDS[0]), rtol=1e-5)
        chance = 0.25 * variety  # four standard deviations of the cosine to noise
        assert cosine(start, SEEDS[0]) == pytest.approx(np.sqrt(1 - variety**2), abs=chance + 1e-6)
        np.testing.assert_array_equal(start, starts.spread(SEEDS[:1], 7, number, variety))
        assert (start != starts.spread(SEEDS[:1], 8, number, variety)).any() or not variety


def test_norm_aware_starts_are_turned_from_places_near_a_known_seed(monkeypatch):
    start = starts.norm_aware(SEEDS, 7, 0.3)
    found = [start(number) for number in range(6)]
    np.testing.assert_array_equal(found[2], start(2))
    for one, other in itertools.combinations(found, 2):
        assert cosine(one, other) < 0.98
    monkeypatch.setattr(starts, "_turned", lambda point, draw, sine: point)
    ways = [start(number) for number in range(6)]
    for one, way in zip(found, ways, strict=True):
        assert max(cosine(way, seed) for seed in SEEDS) > 0.9
        np.testing.assert_allclose(np.linalg.norm(one), np.linalg.norm(way), rtol=1e-5)
        assert 0.88 < cosine(one, way) < 0.99

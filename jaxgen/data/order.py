"""The order of training: a pure function of the seed and of a place in the run.

Nothing is drawn in sequence, so that batch n is found without the n - 1 before it, by any worker.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import partial
from typing import Any, NamedTuple

import numpy as np

ENDLESS = 1 << 62
DENOMINATOR = 1_000_000  # of the weights of sources
TRIES = 16  # so many examples in a row are tried where one should be

Size = tuple[int, int]


class Draw(NamedTuple):
    """What stands at one place of the order."""

    source: int
    group: Sequence[int] | np.ndarray  # examples of the source, one as good as another
    at: int  # which of the group
    size: Size  # width and height to train at

    def candidates(self) -> list[int]:
        """The example, and those to take in its stead where it is bad.

        They lie far apart, in steps by the golden ratio: a lost file is seldom lost alone, and its
        neighbours are lost with it. Small groups are tried to the last.
        """
        n = len(self.group)
        step = max(1, round(0.618 * n))
        while math.gcd(step, n) > 1:
            step += 1
        return [int(self.group[(self.at + t * step) % n]) for t in range(min(TRIES, n))]


class Plain:
    """Every example by itself, all at one size: each epoch of a source is a permutation.

    Args:
        lengths: of the sources.
        weights: shares of the sources in the examples.
        shuffle: otherwise each source runs in its own order.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        weights: Sequence[float],
        size: Size,
        batch_size: int,
        seed: int,
        shuffle: bool,
    ):
        self._turns = turns(weights)
        self._indices = [shuffled(n, shuffle, seed, s) for s, n in enumerate(lengths)]
        self._groups = [range(n) for n in lengths]
        self._size = size
        self._batch_size = batch_size

    def draws(self, n: int, rows: Sequence[int]) -> list[Draw]:
        """What stands in these rows of global batch n."""
        found = []
        for row in rows:
            source, turn = self._turns(n * self._batch_size + row)
            found.append(
                Draw(source, self._groups[source], self._indices[source][turn], self._size)
            )
        return found


def turns(weights: Sequence[float]) -> Callable[[int], tuple[int, int]]:
    """k -> (source, how often it had its turn before), in shares of the weights.

    A weight is taken for the fraction that was meant, such as 0.7 for 7/10. Of the first k places a
    source has k times its share, within one.
    """
    exact = [Fraction(weight).limit_denominator(DENOMINATOR) for weight in weights]
    exact = [part or Fraction(weight) for part, weight in zip(exact, weights)]
    whole = math.lcm(*(part.denominator for part in exact))
    return partial(_turn, [int(part * whole) for part in exact])


def _turn(shares: list[int], k: int) -> tuple[int, int]:
    # Each source in turn takes its share of what those before it left: of the first k places, and
    # of the first k + 1. Where these differ, the place is its.
    rest = sum(shares)
    before, after = k, k + 1
    for source, share in enumerate(shares):
        left, left_after = (n * (rest - share) // rest for n in (before, after))
        if before - left < after - left_after:
            return source, before - left
        rest -= share
        before, after = left, left_after
    raise AssertionError("the last source takes what is left")


def shuffled(n: int, shuffle: bool, seed: int, *path: int) -> Any:
    """Endless: k -> a number below n, in another order each epoch of n."""
    import grain

    numbers = grain.MapDataset.range(n)
    if not shuffle:
        return numbers
    own = np.random.SeedSequence([seed, *path]).generate_state(1)[0]
    return numbers.shuffle(seed=int(own))

"""Counts and names bad examples, and stops where they are too many."""

import logging

from jaxgen.types import UserError

LEAST_DRAWN = 1000  # the share of bad examples is one of so many at least: two in three are luck
MOST_NAMED = 1000  # bad examples that are named one by one
logger = logging.getLogger(__name__)


class Tally:
    """How many examples were seen, and how many of them were bad.

    Attributes:
        named: the bad ones, and why; the first `MOST_NAMED`, each once.
    """

    def __init__(self, share: float) -> None:
        """Begins with none; `share` is the largest share that may be bad."""
        self._share = share
        self.seen = self.bad = 0
        self.named: dict[str, str] = {}

    @property
    def first(self) -> str:
        """The first bad one, as the end of an error."""
        return next((f"the first is {name}: {reason}" for name, reason in self.named.items()), "")

    def add(self, seen: int, bad: list[tuple[str, str]]) -> None:
        """So many more examples, and which of them are bad. UserError where these are too many."""
        for name, reason in bad:
            if name not in self.named and len(self.named) < MOST_NAMED:
                self.named[name] = reason
                logger.warning("skipped %s: %s", name, reason)
        self.seen += seen
        self.bad += len(bad)
        if self.bad > self._share * max(self.seen, LEAST_DRAWN):
            raise UserError(
                f"{self.bad} of {self.seen} examples are bad, more than bad_share "
                f"{self._share:g}; {self.first}"
            )

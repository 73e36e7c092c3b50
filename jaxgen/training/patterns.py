"""Patterns over the paths of parameters: regular expressions, found anywhere in a path."""

import re
from collections.abc import Sequence
from typing import Any

from jaxgen.types import UserError


def fits(pattern: str, path: str) -> bool:
    """Whether the pattern is found in the path."""
    return re.search(pattern, path) is not None


def check_written(field: str, patterns: Any) -> None:
    """UserError, naming the field, unless these are a tuple of regular expressions."""
    if not isinstance(patterns, tuple) or not all(isinstance(p, str) for p in patterns):
        raise UserError(f"{field} = {patterns!r} is not a tuple of patterns, as in ('bias$',)")
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"{field}: {pattern!r} is not a regular expression: {error}") from None


def check_factors(field: str, rates: Any) -> None:
    """UserError, naming the field, unless these are a tuple of (pattern, factor from 0)."""
    pairs = isinstance(rates, tuple) and all(isinstance(r, tuple) and len(r) == 2 for r in rates)
    if not pairs:
        raise UserError(f"{field} = {rates!r} is not of pairs, as in (('bias$', 0.1),)")
    check_written(field, tuple(pattern for pattern, _ in rates))
    for pattern, factor in rates:
        if not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
            raise UserError(f"{field}: factor {factor!r} of {pattern!r} is not a number from 0")


def check_reach(field: str, pattern: str, paths: Sequence[str]) -> None:
    """UserError, naming the field, for a pattern that fits none of the paths."""
    if not any(fits(pattern, path) for path in paths):
        example = f", such as {paths[0]}" if paths else "; none is left for it"
        raise UserError(f"{field}: {pattern!r} fits no parameter{example}")

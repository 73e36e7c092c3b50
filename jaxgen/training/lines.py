"""Means of scalars between the lines of a JSON-lines file that a killed run may have torn."""

import contextlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

LAST = ("learning_rate", "skipped")  # the last value stands for an interval, not the mean


class Means:
    """Means of scalars, of each over the steps that had it. Sums are exact through JSON."""

    def __init__(self, state: Mapping[str, Any]) -> None:
        """Begins where another's `state()` was, or anew with an empty one."""
        self._sums = {name: (float(total), int(count)) for name, (total, count) in state.items()}

    def add(self, values: Mapping[str, float]) -> None:
        """Takes the scalars of a step."""
        for name, value in values.items():
            total, count = self._sums.get(name, (0.0, 0))
            self._sums[name] = (value, 1) if name in LAST else (total + value, count + 1)

    def take(self) -> dict[str, float]:
        """The means since the last time, by name; the next ones begin anew."""
        means = {name: total / count for name, (total, count) in self._sums.items()}
        self._sums = {}
        return means

    def state(self) -> dict[str, Any]:
        """Sums and counts, for JSON."""
        return {name: [total, count] for name, (total, count) in self._sums.items()}


def line(values: Mapping[str, float]) -> str:
    """One line of JSON, which knows no infinity: what is not finite becomes null."""
    known = {name: value if math.isfinite(value) else None for name, value in values.items()}
    return json.dumps(known) + "\n"


def keep_until(path: Path, step: int) -> None:
    """Drops the lines that are of later steps, or torn by a kill. There may be no such file.

    Raises:
        OSError: if the folder cannot be written to. The file is then as it was.
    """
    if not path.exists():
        return
    kept = []
    for text in path.read_text("utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, TypeError, KeyError):
            if json.loads(text)["step"] <= step:
                kept.append(text + "\n")
    scratch = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        scratch.write_text("".join(kept), "utf-8")
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)

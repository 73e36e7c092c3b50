"""What must agree: a run with the one that it goes on with, and its processes with each other."""

import json
from typing import Any

from jaxgen.training import together
from jaxgen.training.checkpoint import Checkpoints
from jaxgen.training.recipe import Train, differences, fields
from jaxgen.types import UserError


def past(recipe: Train, checkpoints: Checkpoints) -> dict[str, Any] | None:
    """The record of the checkpoint to go on from; None for a new run.

    Raises:
        UserError: for a checkpoint of another run, or of a later step than the last one wanted.
    """
    latest = checkpoints.latest
    if latest is None:
        return None
    record = checkpoints.record(latest)
    if not isinstance(record, dict) or not {"recipe", "data", "log"} <= record.keys():
        raise UserError(f"{checkpoints.folder} is of another program; name another folder (out)")
    if different := differences(record["recipe"], fields(recipe)):
        raise UserError(
            f"{checkpoints.folder} is of another run ({'; '.join(different)}): "
            "undo the change, or name another folder (out)"
        )
    if latest > recipe.steps:
        raise UserError(
            f"{checkpoints.folder} is at step {latest} already, beyond steps = {recipe.steps}: "
            f"ask for {latest} or more, or name another folder (out)"
        )
    return record


def check_one_order(found: dict[str, Any]) -> None:
    """UserError, on every process, unless all of them read the same data in the same order.

    All of them must call it.
    """
    if other := together.other(found):
        raise UserError(
            f"processes 0 and {other} find different data: name a folder that all of them share, "
            "and look for files that one of them cannot read"
        )


def check_one_view(recipe: Train, checkpoints: Checkpoints, done: bool) -> None:
    """UserError, on every process, unless all of them do the same, and go on from the same step.

    All of them must call it. A folder may have another name for each of them.
    """
    same = {k: v for k, v in fields(recipe).items() if k != "out" and not k.startswith("data.")}
    if other := together.other(same):
        raise UserError(f"processes 0 and {other} are given different configs or options")
    if other := together.other([checkpoints.latest, done]):
        raise UserError(
            f"processes 0 and {other} find different checkpoints or models, here that of step "
            f"{checkpoints.latest} in {checkpoints.folder}: name a folder that all share (out)"
        )


def check_same_data(found: dict[str, Any], record: dict[str, Any], folder: Any) -> None:
    """UserError unless the data are those that a checkpoint's run saw."""
    different = _changes(record["data"], json.loads(json.dumps(found)))
    if different:
        raise UserError(
            f"the data are not those of {folder} ({'; '.join(different)}): "
            "bring them back, or name another folder (out)"
        )


def _changes(then: Any, now: Any, name: str = "") -> list[str]:
    """Where two JSON values differ: "sources.0.length: 16, now 15"."""
    if isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        then, now = dict(enumerate(then)), dict(enumerate(now))
    if isinstance(then, dict) and isinstance(now, dict):
        return [
            change
            for key in dict.fromkeys([*then, *now])
            for change in _changes(
                then.get(key), now.get(key), f"{name}.{key}" if name else str(key)
            )
        ]
    return [] if then == now else [f"{name}: {then}, now {now}"]

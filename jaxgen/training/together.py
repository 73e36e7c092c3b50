"""What the processes of a run tell each other without their devices: that one of them has failed.

A device waits in a product of all devices for one that never comes, for minutes, and there is no
saving then. So processes meet where devices are not needed, each time before they are.
"""

import contextlib
import itertools
import json
import zlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from jax._src import distributed  # jax's own service: of what is public, all needs the devices
from jax.experimental import multihost_utils

from jaxgen.types import UserError

_MEETING = "jaxgen/meeting"
_FAILED = "jaxgen/failed"
_LATEST = 7 * 24 * 3600  # seconds that one may take; who dies is missed by the service, long before
_LEAVING = 60  # seconds for the others to hear of a failure
_rounds = itertools.count()  # each meeting's; the same on all processes


class Told(UserError):
    """A failure that all processes know of."""


def meet(error: UserError | None = None) -> UserError | None:
    """Waits for the others. Where any has failed, all of them get that, or their own error.

    All of them must call it, as often. Alone it is what it was given.
    """
    if jax.process_count() == 1:
        return error
    failed = _meet(error, _LATEST)
    if error is not None:
        return Told(str(error))
    if not failed:
        return None
    key, what = min(failed)
    return Told(f"process {key.rsplit('/')[-1]}: {what}")


def ready() -> None:
    """Before all do what none can do alone. Raises UserError if one of them has failed."""
    if error := meet():
        raise error


def other(found: Any) -> int:
    """A process that finds something else than the first one does, of JSON; 0 if none does."""
    if jax.process_count() == 1:
        return 0
    ready()
    crc = np.uint32(zlib.crc32(json.dumps(found, sort_keys=True).encode()))
    each = multihost_utils.process_allgather(crc).tolist()
    return next((i for i, one in enumerate(each) if one != each[0]), 0)


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """Of an error that ends this process the others hear where they meet next, and end with it."""
    try:
        yield
    except BaseException as error:
        if jax.process_count() > 1 and not isinstance(error, Told):
            # They may wait for this one's devices, or have ended: then there is no meeting.
            with contextlib.suppress(jax.errors.JaxRuntimeError):
                _meet(error, _LEAVING)
        raise


def _meet(error: BaseException | None, seconds: int) -> list[tuple[str, str]]:
    """What failed, by a key that ends in the process."""
    client: Any = distributed.global_state.client
    failed = f"{_FAILED}/{next(_rounds)}"
    if error is not None:
        what = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        client.key_value_set(f"{failed}/{jax.process_index()}", what[:1000])
    client.wait_at_barrier(_MEETING, seconds * 1000)
    return client.key_value_dir_get(f"{failed}/")

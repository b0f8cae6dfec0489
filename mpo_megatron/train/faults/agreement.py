"""Work of one rank for all, and how all ranks get its outcome."""

from __future__ import annotations

import socket
import time
from collections.abc import Callable

from torch.distributed import all_gather_object, broadcast_object_list, get_world_size

from mpo_megatron.model.parallel import Ranks

LATE_SECONDS = 100.0
"""Seconds that a file server may need to show one machine's files to another: NFS caches absent files for 60."""


def on_main[Result](ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Run an action on the main rank; return or raise its outcome on all ranks, so that none waits for a failed rank.

    Raises:
        OSError, ValueError: the action's exception (configuration and data errors are ValueErrors).
    """
    outcome: list[tuple[Result | None, Exception | None]] = [(None, None)]
    if ranks.is_main:
        try:
            outcome = [(action(), None)]
        except (OSError, ValueError) as error:
            outcome = [(None, error)]
    broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if failure is not None:
        raise failure
    return result  # type: ignore[return-value]  # None is what the action gave


def machines_without(is_there: Callable[[], bool]) -> list[str]:
    """Names of the machines that do not see, even after a while, what the main rank has written; all ranks call it."""
    deadline = time.monotonic() + LATE_SECONDS
    while not (found := is_there()) and time.monotonic() < deadline:
        time.sleep(0.1)
    machines: list[str | None] = [None] * get_world_size()
    all_gather_object(machines, None if found else socket.gethostname())
    return sorted({machine for machine in machines if machine is not None})

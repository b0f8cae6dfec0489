"""What one rank does for all, and how all learn what came of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch.distributed import broadcast_object_list

from mpo_megatron.model.parallel import Ranks

Result = TypeVar("Result")


def on_main(ranks: Ranks, action: Callable[[], Result]) -> Result:
    """Do something on the main rank; what it gives, or raises, on all, so that none waits for one that has failed.

    Raises:
        OSError, ValueError: what the action raised (configuration and data errors are value errors).
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

"""An additional loss term with its own rows, such as a regulariser on samples from the policy.

The trainer only knows this interface; the code that starts the run provides the term and its rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from megatron.core.utils import get_model_config


class GradientTerm(Protocol):
    """A loss term with its own rows."""

    def resume(self, done: int) -> None:
        """Discard what belongs to steps after the first `done` ones; all ranks call it once, before the first step."""

    def add(self, step: int) -> dict[str, float]:
        """Add the term's gradients at a step (counted from 0) to the buffers, before the loss's own, unreduced; its metrics.

        All ranks call it. The loss's pass later reduces the buffers over replicas, including this term's gradients.
        """


@contextlib.contextmanager
def unreduced_gradients(model: Sequence[Any]) -> Iterator[None]:
    """Within this context, a backward pass adds to this rank's buffers without reducing over replicas: a later pass does.

    Reducing twice would count the first pass's gradients once per replica, because the reduced sum is in the buffer that is
    reduced again. Reduction happens at a pass's end (`finalize_model_grads_func`), or with overlap during its last row, which a
    schedule signals by leaving `no_sync_func`. So the schedule gets none, and the whole pass runs within `no_sync`.
    """
    with contextlib.ExitStack() as stack:
        for part in model:
            stack.enter_context(part.no_sync())
            config = get_model_config(part)
            for name in ("finalize_model_grads_func", "no_sync_func"):
                stack.callback(setattr, config, name, getattr(config, name))
                setattr(config, name, None)
        yield

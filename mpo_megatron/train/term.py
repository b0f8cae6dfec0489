"""What a run may add to its loss: a term whose rows are not those of the data, such as a regulariser on samples of the policy.

The trainer knows that there is one; what it is, and how it gets its rows, whoever starts the run brings along.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from megatron.core.utils import get_model_config


class GradientTerm(Protocol):
    """A term of the loss with rows of its own."""

    def resume(self, done: int) -> None:
        """Forget what belongs to steps after the first `done` ones; all ranks call it, once, before the first step."""

    def add(self, step: int) -> dict[str, float]:
        """Add the term's gradients at a step (counted from 0) to the buffers, before the loss's own, unreduced; its metrics.

        All ranks call it. The loss's pass reduces the buffers over replicas, this term's gradients with it.
        """


@contextlib.contextmanager
def unreduced_gradients(model: Sequence[Any]) -> Iterator[None]:
    """Within it a backward pass adds to this rank's buffers and reduces nothing over replicas: another pass will.

    Reducing twice would count the first pass's gradients once per replica (the reduced sum lies in the buffer that is reduced
    again). Reduction happens at a pass's end (`finalize_model_grads_func`), or with overlap during its last row, which a
    schedule tells by leaving `no_sync_func`: so the schedule gets none, and the whole pass lies within `no_sync`.
    """
    with contextlib.ExitStack() as stack:
        for part in model:
            stack.enter_context(part.no_sync())
            config = get_model_config(part)
            for name in ("finalize_model_grads_func", "no_sync_func"):
                stack.callback(setattr, config, name, getattr(config, name))
                setattr(config, name, None)
        yield

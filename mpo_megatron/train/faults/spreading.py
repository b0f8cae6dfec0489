"""Requests to stop, passed on through the rendezvous store, for ranks without `mpo train` as their launcher.

Under plain torchrun on several machines, or srun, a rank that is asked to stop while it starts would leave the others waiting
for it. So it joins them first (signals.py), then it leaves a word in the store, and all leave together.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from torch.distributed import distributed_c10d

from mpo_megatron.train.faults import signals

KEY = "mpo/request"


class StoreChannel:
    """A message that one rank leaves for all others. A store that has ended has none."""

    def __init__(self, store: distributed_c10d.Store) -> None:
        self.store = store

    def tell(self, number: signal.Signals) -> None:
        """Tell the other ranks that this one leaves on request."""
        with contextlib.suppress(RuntimeError):
            self.store.set(KEY, number.name)

    def told(self) -> signal.Signals | None:
        """The signal that another rank leaves for, or None."""
        with contextlib.suppress(RuntimeError):
            if self.store.check([KEY]):
                return signal.Signals[self.store.get(KEY).decode()]
        return None


@contextlib.contextmanager
def spreading_requests() -> Iterator[None]:
    """Within it, a rank that stops on request stops the others, too; all ranks enter it once they have joined."""
    signals.join(StoreChannel(distributed_c10d._get_default_store()))
    try:
        yield
    finally:
        signals.part()

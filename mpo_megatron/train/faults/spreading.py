"""Pass requests to stop on through the rendezvous store, for ranks that `mpo train` did not launch.

Under plain torchrun on several machines, or srun, a rank that exits during start-up would leave the others waiting. So it joins
them first (signals.py), then writes a message to the store, and all exit together.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator

from torch.distributed import distributed_c10d

from mpo_megatron.train.faults import signals

KEY = "mpo/request"


class StoreChannel:
    """A message from one rank to all others. A store that has ended has none."""

    def __init__(self, store: distributed_c10d.Store) -> None:
        self.store = store

    def tell(self, number: signal.Signals) -> None:
        """Announce that this rank exits on request."""
        with contextlib.suppress(RuntimeError):
            self.store.set(KEY, number.name)

    def told(self) -> signal.Signals | None:
        """The signal because of which another rank exits, or None."""
        with contextlib.suppress(RuntimeError):
            if self.store.check([KEY]):
                return signal.Signals[self.store.get(KEY).decode()]
        return None


@contextlib.contextmanager
def spreading_requests() -> Iterator[None]:
    """Within this context, a rank that stops on request also stops the others; all ranks enter it after joining."""
    signals.join(StoreChannel(distributed_c10d._get_default_store()))
    try:
        yield
    finally:
        signals.part()

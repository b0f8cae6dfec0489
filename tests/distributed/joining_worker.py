"""A rank that receives a stop request during start-up: `python -m tests.distributed.joining_worker PHASE`.

PHASE: starting (rank 1 is asked before it has joined), loading (rank 0 is asked, which holds the store), alone (the others never
come, and this rank is asked), waiting (the others never come).
"""

from __future__ import annotations

import os
import signal
import sys
import time

from mpo_megatron.train.faults import signals
from mpo_megatron.train.rank import be_rank


def work() -> str | None:
    """Join the other ranks, and load until a stop request."""
    from mpo_megatron.config import ParallelConfig
    from mpo_megatron.model.parallel import model_parallel
    from mpo_megatron.train.faults.spreading import spreading_requests

    phase, rank = sys.argv[1], int(os.environ["RANK"])
    if (phase, rank) in (("starting", 1), ("alone", 0)):
        os.kill(os.getpid(), signal.SIGUSR1)
    if phase == "alone":
        signals.JOIN_SECONDS = 0.5
    with model_parallel(ParallelConfig(timeout_minutes=0.02 if phase == "waiting" else 5.0), 0), spreading_requests():
        if (phase, rank) == ("loading", 0):
            os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(1000)
    return None


if __name__ == "__main__":
    be_rank("mpo train", work)

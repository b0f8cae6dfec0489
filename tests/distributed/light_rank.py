"""A rank that does everything except compute: it starts in 0.1 s, and stops, fails and receives requests like a real one.

    python -m tests.distributed.light_rank FOLDER PHASE

PHASE: loading (nothing to save), steps (until asked to stop), wrong (an error of the user's), broken (ours, in rank 1).
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path

from mpo_megatron.train.faults import signals
from mpo_megatron.train.rank import be_rank


def work() -> str | None:
    """Report that this rank runs, and act as the command line requires."""
    folder, phase, rank = Path(sys.argv[1]), sys.argv[2], os.environ["RANK"]
    if phase == "steps":
        signals.defer()
    with contextlib.suppress(BrokenPipeError):
        print(f"rank {rank} works", flush=True)
    (folder / f"started-{rank}").write_text(str(os.getpid()))
    while len(list(folder.glob("started-*"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    if phase == "wrong":
        from mpo_megatron.config import ConfigError

        raise ConfigError("loss.name = x; there is no such loss.")
    if phase == "broken" and rank == "1":
        raise RuntimeError("out of memory")
    while phase != "steps" or signals.requested() is None:
        time.sleep(0.01)
    (folder / f"saved-{rank}").touch()
    return signals.requested().name  # type: ignore[union-attr]


if __name__ == "__main__":
    be_rank("mpo train", work)

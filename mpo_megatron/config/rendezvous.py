"""The error of a rank whose peers did not connect. Imports nothing slow."""

from __future__ import annotations

import os


class RendezvousError(RuntimeError):
    """Not all ranks connected; the message gives the waiting time, and where to look. A restart may help."""

    def __init__(self, timeout_minutes: float) -> None:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        super().__init__(
            f"rank {os.environ.get('RANK')} of {os.environ.get('WORLD_SIZE')} waited for the others at {place}, for at most "
            f"parallel.timeout_minutes = {timeout_minutes:g} minutes, but not all of them connected; look for a rank that ended "
            "or never started, and check that every machine reaches that address; then run the same command again."
        )

"""When to stop: all ranks agree after each piece of work, on any rank's request or when time is nearly over."""

from __future__ import annotations

import os
import signal
import time
from collections import deque

import torch

from mpo_megatron import device
from mpo_megatron.config import FaultConfig
from mpo_megatron.train.faults import signals

STARTED = "MPO_STARTED"
"""Environment variable with the time at which `mpo train` was called; survives restarts of the ranks."""

WALLTIME = 1000
"""Stands for "time is over" in place of a signal number."""

LEAST_MARGIN = 60.0
"""Minimum number of seconds reserved for the last save."""


class Stopped(Exception):  # noqa: N818  # no error
    """All ranks stop at the same point on request; the message gives the reason."""


class Deadline:
    """When the run must have saved: `walltime_minutes` after its start, or at the end of the Slurm job."""

    def __init__(self, config: FaultConfig) -> None:
        end: float | None = None
        if config.walltime_minutes is not None:
            end = float(os.environ.get(STARTED, time.time())) + 60 * config.walltime_minutes
        elif "SLURM_JOB_END_TIME" in os.environ:
            end = float(os.environ["SLURM_JOB_END_TIME"])
        # From here on a monotonic clock, which nobody can set.
        self.time = None if end is None else time.monotonic() + end - time.time()
        self.slow_steps: deque[float] = deque(maxlen=32)

    def is_near(self, step_seconds: float, save_seconds: float) -> bool:
        """Whether another step might leave too little time to save. The margin is the slowest of the last steps plus twice the
        slowest save, and at least a minute."""
        self.slow_steps.append(step_seconds)
        if self.time is None:
            return False
        return time.monotonic() + max(self.slow_steps) + max(2 * save_seconds, LEAST_MARGIN) > self.time


class Pauses:
    """Points between pieces of longer work where it may stop. Finished pieces are kept."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline, self.since = deadline, time.perf_counter()

    def stop_if_asked(self, save_seconds: float = 0.0) -> None:
        """Stop all ranks if one received a request, or if time is nearly over; all ranks call it after each piece of work.

        Args:
            save_seconds: duration of a save
        Raises:
            Stopped: on all ranks.
        """
        seconds = time.perf_counter() - self.since
        self.since = time.perf_counter()
        # MAX over all ranks, whichever received the request; no gradients.
        request = torch.tensor(own_request(self.deadline, seconds, save_seconds), device=device.device())
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX)
        if reason := name_request(int(request)):
            raise Stopped(reason)


def own_request(deadline: Deadline, seconds: float, save_seconds: float) -> int:
    """A signal number, or `WALLTIME`, if this rank has a reason to stop; otherwise 0."""
    request = signals.requested()
    near = deadline.is_near(seconds, save_seconds)
    return request or (WALLTIME if near else 0)


def name_request(request: int) -> str | None:
    """The name of a request; None for 0."""
    if request == 0:
        return None
    return "the time is nearly over" if request == WALLTIME else signal.Signals(request).name

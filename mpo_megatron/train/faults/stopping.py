"""When to stop: all ranks agree after each piece of work, whichever received the request, or when time is nearly over."""

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
"""Environment variable with the time at which `mpo train` was called, which outlives restarts of the ranks."""

WALLTIME = 1000
"""Means "the time is over" in place of a signal's number."""

LEAST_MARGIN = 60.0
"""Least number of seconds for the last save."""


class Stopped(Exception):  # noqa: N818  # no error
    """All ranks stop at the same place on request; the message says why."""


class Deadline:
    """When the run must have saved: `walltime_minutes` after its start, or when Slurm ends the job."""

    def __init__(self, config: FaultConfig) -> None:
        end: float | None = None
        if config.walltime_minutes is not None:
            end = float(os.environ.get(STARTED, time.time())) + 60 * config.walltime_minutes
        elif "SLURM_JOB_END_TIME" in os.environ:
            end = float(os.environ["SLURM_JOB_END_TIME"])
        # From here on by a clock that nobody sets.
        self.time = None if end is None else time.monotonic() + end - time.time()
        self.slow_steps: deque[float] = deque(maxlen=32)

    def is_near(self, step_seconds: float, save_seconds: float) -> bool:
        """Whether another step might leave too little time to save: the margin is the slowest of the last steps, twice the
        slowest save, and a minute at least."""
        self.slow_steps.append(step_seconds)
        if self.time is None:
            return False
        return time.monotonic() + max(self.slow_steps) + max(2 * save_seconds, LEAST_MARGIN) > self.time


class Pauses:
    """The pauses between pieces of longer work, where it may stop. Finished pieces are kept."""

    def __init__(self, deadline: Deadline) -> None:
        self.deadline, self.since = deadline, time.perf_counter()

    def stop_if_asked(self, save_seconds: float = 0.0) -> None:
        """Stop all ranks if one received a request, or if the time is nearly over; all ranks call it after each piece of work.

        Args:
            save_seconds: what saves take
        Raises:
            Stopped: on all ranks.
        """
        seconds = time.perf_counter() - self.since
        self.since = time.perf_counter()
        # MAX over all ranks, whoever got the request; no gradients.
        request = torch.tensor(own_request(self.deadline, seconds, save_seconds), device=device.device())
        torch.distributed.all_reduce(request, op=torch.distributed.ReduceOp.MAX)
        if reason := name_request(int(request)):
            raise Stopped(reason)


def own_request(deadline: Deadline, seconds: float, save_seconds: float) -> int:
    """A signal's number, or `WALLTIME`, if this rank knows of a reason to stop; 0 otherwise."""
    request = signals.requested()
    near = deadline.is_near(seconds, save_seconds)
    return request or (WALLTIME if near else 0)


def name_request(request: int) -> str | None:
    """What to call a request; None for 0."""
    if request == 0:
        return None
    return "the time is nearly over" if request == WALLTIME else signal.Signals(request).name

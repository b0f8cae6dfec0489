"""What a run watches besides its loss: requests to stop, its time limit, hanging ranks and slow ranks.

After every step all ranks exchange a few numbers (`Supervisor.after_step`: one small all-gather), so all know whether to stop,
whether the current save is written everywhere, and which rank was slow. So they agree on the step at which they stop, whichever
rank received the signal.
"""

from __future__ import annotations

import faulthandler
import os
import random
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.utils import get_model_config

from mpo_megatron import device
from mpo_megatron.config import FaultConfig
from mpo_megatron.train import launched
from mpo_megatron.train.faults.stopping import Deadline, Pauses, name_request, own_request

STEP_SEEDS = 1_000_003
"""Distance between the seeds of two steps; large, so that runs with neighbouring seeds share none."""

RESTARTS = (launched.RESTART_COUNT, "TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
"""Environment variables that count a job's restarts."""

SLOW_RATIO, SLOW_STEPS = 1.1, 20
"""Report a rank `SLOW_RATIO` slower than the mean for `SLOW_STEPS` consecutive steps (then ten times as many, and so on)."""

DISK_SECONDS = 30
"""Seconds for a hanging rank to write its stacks."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks know after a step."""

    stop: str | None
    """Why the run must stop now; None if it need not."""
    all_written: bool
    """Whether every rank has written its part of the current save."""
    metrics: dict[str, float]
    """The slow rank: see `Supervisor.after_step`."""


class Watchdog:
    """Ends a rank that makes no progress, and reports its stacks.

    A hung collective never returns to Python, so a thread watches: after too long without `beat`, it writes all threads' stacks
    to `<run>/incidents/hang_…` and to stderr, and ends the process. torchrun then ends the other ranks (each of which writes its
    own stacks) and restarts all of them.
    """

    def __init__(self, config: FaultConfig, run: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = 60 * config.hang_minutes, run / "incidents", rank
        self.doing, self.since = "starting", time.monotonic()
        self.closed = threading.Event()
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Report progress, and name the work that starts now."""
        self.doing, self.since = doing, time.monotonic()

    def close(self) -> None:
        """Stop watching."""
        self.closed.set()

    def _watch(self) -> None:
        while not self.closed.wait(min(5.0, self.seconds / 4)):
            idle = time.monotonic() - self.since
            if idle > self.seconds:
                self._end(
                    f"rank {self.rank} on {socket.gethostname()}: no progress for {idle:.0f} s in {self.doing} "
                    "(faults.hang_minutes), so it ends; check the rank whose stack differs from the others'"
                )

    def _end(self, message: str) -> None:
        path = self.folder / f"hang_{self.doing.replace(' ', '_')}_rank_{self.rank:05d}.txt"
        print(f"{message}; stacks in {path}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(DISK_SECONDS, exit=True)  # the disk may hang too
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with path.open("w") as file:
                file.write(message + "\n")
                file.flush()
                faulthandler.dump_traceback(file, all_threads=True)
        finally:
            faulthandler.dump_traceback(sys.stderr, all_threads=True)
            os._exit(1)


class SlowRanks:
    """Reports a rank that stays slow over many steps, and its machine."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts, self.rank, self.steps, self.told_at = hosts, -1, 0, SLOW_STEPS

    def note(self, rank: int, ratio: float) -> str | None:
        """Record a step's slowest rank and the ratio of its time to the mean; return a message to report, if any."""
        if rank != self.rank or ratio < SLOW_RATIO:
            self.rank, self.steps, self.told_at = rank, 0, SLOW_STEPS
        self.steps += ratio >= SLOW_RATIO
        if self.steps < self.told_at:
            return None
        self.told_at *= 10
        return (
            f"SLOW: rank {rank} on {self.hosts[rank]} was the slowest of the last {self.steps} steps, now {ratio:.2f} times the "
            "mean; all ranks wait for it: check that machine, or exclude it."
        )


class Supervisor:
    """Keeps the ranks of a run together: progress, agreement after every step, timing."""

    def __init__(self, config: FaultConfig, run: Path) -> None:
        self.rank, self.world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self.watchdog = Watchdog(config, run, self.rank)
        self.deadline = Deadline(config)
        self.step_started = self.reduction_started = time.perf_counter()
        self.data_wait = 0.0
        hosts: list[Any] = [None] * self.world
        torch.distributed.all_gather_object(hosts, socket.gethostname())
        self.slow_ranks = SlowRanks(hosts)

    def watch_reduction(self, model: list[torch.nn.Module]) -> None:
        """Record when a step's gradients are about to be reduced over replicas: from there, fast ranks wait for slow ones."""
        for part in model:
            config = get_model_config(part)
            config.finalize_model_grads_func = self._timed(config.finalize_model_grads_func)

    def _timed(self, finalize: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            device.finish_computing()
            self.reduction_started = time.perf_counter()
            return finalize(*args, **kwargs)

        return timed

    def watch_data[Item](self, batches: Iterable[Item]) -> Iterator[Item]:
        """Yield the same batches, and time the wait for each."""
        iterator = iter(batches)
        while True:
            asked = time.perf_counter()
            try:
                batch = next(iterator)
            except StopIteration:
                return
            self.step_started = self.reduction_started = time.perf_counter()
            self.data_wait = self.step_started - asked
            yield batch

    def after_step(self, *, has_written: bool, save_seconds: float) -> Agreement:
        """Exchange every rank's state; all ranks call it once after each step.

        Metrics: `data_wait`, the longest wait of any rank for its data, seconds; with several ranks also
        `step_seconds_max_over_mean`, the slowest rank's time from the start of the step to the reduction of gradients, divided by
        the ranks' mean, and `slowest_rank`, its number. Ranks of one model replica wait for each other within a step, so this
        distinguishes replicas: the rank belongs to the slow replica.

        Args:
            has_written: whether this rank has written its part of the current save
            save_seconds: duration of a save
        """
        working = self.reduction_started - self.step_started
        request = own_request(self.deadline, time.perf_counter() - self.step_started, save_seconds)
        own = torch.tensor([request, has_written, working, self.data_wait], dtype=torch.float64, device=device.device())
        everyone = own.new_empty(self.world * len(own))
        torch.distributed.all_gather_into_tensor(everyone, own)  # over all ranks; no gradients
        requests, written, seconds, waits = everyone.cpu().view(self.world, len(own)).unbind(dim=1)
        mean, slowest = float(seconds.mean()), int(seconds.argmax())
        ratio = float(seconds.max()) / mean if mean > 0 else 1.0
        told = self.slow_ranks.note(slowest, ratio)
        if told is not None and self.rank == 0:
            print(told, flush=True)
        return Agreement(
            stop=name_request(int(requests.max())),
            all_written=bool(written.all()),
            metrics={"data_wait": float(waits.max())}
            | ({"slowest_rank": slowest, "step_seconds_max_over_mean": ratio} if self.world > 1 else {}),
        )

    def pauses(self, doing: str, save_seconds: float) -> Callable[[], None]:
        """A function for longer work in the run (an evaluation) to call after each piece; it raises `Stopped` on all ranks."""
        pauses = Pauses(self.deadline)

        def pause() -> None:
            self.watchdog.beat(doing)
            pauses.stop_if_asked(save_seconds)

        self.watchdog.beat(doing)
        return pause

    def close(self) -> None:
        """Stop watching: the run is over."""
        self.watchdog.close()


def was_restarted() -> bool:
    """Whether torchrun or Slurm has restarted this run: then it resumes, even if its command asks for a new run."""
    return any(int(os.environ.get(name, "0")) > 0 for name in RESTARTS)


def seed_everything(seed: int, step: int) -> None:
    """Make draws from global generators a function of seed and step: a resumed run draws the same on any layout, and no generator
    state is saved."""
    random.seed(seed + STEP_SEEDS * step)
    np.random.seed((seed + STEP_SEEDS * step) % 2**32)
    torch.manual_seed(seed + STEP_SEEDS * step)

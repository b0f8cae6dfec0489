"""What a run watches besides its loss: requests to stop, its time limit, hanging ranks and slow ranks.

After every step all ranks exchange a few numbers (`Supervisor.after_step`: one small all-gather) and know the same: whether to
stop, whether the save under way is written everywhere, and who was slow. So they agree on the step at which they stop,
whoever got the signal.
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
"""Environment variables that count how often a job was started again."""

SLOW_RATIO, SLOW_STEPS = 1.1, 20
"""Report a rank `SLOW_RATIO` slower than the mean for `SLOW_STEPS` consecutive steps (then ten times as many, and so on)."""

DISK_SECONDS = 30
"""Seconds that a hanging rank may take to write its stacks."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """What all ranks know after a step."""

    stop: str | None
    """Why the run must stop now, or None."""
    all_written: bool
    """Whether every rank has written its part of the current save."""
    metrics: dict[str, float]
    """Who was slow: see `Supervisor.after_step`."""


class Watchdog:
    """Ends a rank that makes no progress, and reports its stacks.

    A hung collective never returns to Python, so a thread looks: when nothing has called `beat` for too long, it writes all
    threads' stacks to `<run>/incidents/hang_…` and to stderr, and ends the process. torchrun then ends the others (each of which
    has written its own stacks, or does so at the same time) and starts them again.
    """

    def __init__(self, config: FaultConfig, run: Path, rank: int) -> None:
        self.seconds, self.folder, self.rank = 60 * config.hang_minutes, run / "incidents", rank
        self.doing, self.since = "starting", time.monotonic()
        self.closed = threading.Event()
        if self.seconds:
            threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def beat(self, doing: str) -> None:
        """Note progress: what the rank does from now on."""
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
                    "(faults.hang_minutes), so it ends; the rank whose stack differs from the others' is the one to look at"
                )

    def _end(self, message: str) -> None:
        path = self.folder / f"hang_{self.doing.replace(' ', '_')}_rank_{self.rank:05d}.txt"
        print(f"{message}; stacks in {path}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(DISK_SECONDS, exit=True)  # it may be the disk that hangs
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
    """Reports a rank that is slow step after step, and its machine."""

    def __init__(self, hosts: Sequence[str]) -> None:
        self.hosts, self.rank, self.steps, self.told_at = hosts, -1, 0, SLOW_STEPS

    def note(self, rank: int, ratio: float) -> str | None:
        """Note the slowest rank of a step and its time over the mean; return what to report, if anything."""
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
        """Note when a step's gradients are about to be reduced over replicas: fast ranks wait for slow ones from there."""
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
        """The same batches, and a note of the wait for each."""
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

        Metrics: `step_seconds_max_over_mean`, the slowest rank's time from the start of the step to the reduction of
        gradients over the ranks' mean, and `slowest_rank`, whose it was. Ranks of one model replica wait for each other within
        a step, so it tells replicas apart: the rank is one of the slow replica. `data_wait`: seconds the rank that waited longest
        for its data waited.

        Args:
            has_written: whether this rank has written its part of the current save
            save_seconds: what saves take
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
            metrics={
                "slowest_rank": slowest,
                "step_seconds_max_over_mean": ratio,
                "data_wait": float(waits.max()),
            },
        )

    def pauses(self, doing: str, save_seconds: float) -> Callable[[], None]:
        """What a longer work within the run (an evaluation) calls after each of its pieces; it raises `Stopped` on all ranks."""
        pauses = Pauses(self.deadline)

        def pause() -> None:
            self.watchdog.beat(doing)
            pauses.stop_if_asked(save_seconds)

        self.watchdog.beat(doing)
        return pause

    def close(self) -> None:
        """End the watch: the run is over."""
        self.watchdog.close()


def was_restarted() -> bool:
    """Whether torchrun or Slurm has started this run again: then it resumes, even if its command asks for a new run."""
    return any(int(os.environ.get(name, "0")) > 0 for name in RESTARTS)


def seed_everything(seed: int, step: int) -> None:
    """Make draws from global generators a function of the seed and the step, so that a resumed run draws
    the same on any layout, and no generator's state need be saved."""
    random.seed(seed + STEP_SEEDS * step)
    np.random.seed((seed + STEP_SEEDS * step) % 2**32)
    torch.manual_seed(seed + STEP_SEEDS * step)

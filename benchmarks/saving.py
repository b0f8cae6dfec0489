"""The cost of a checkpoint: seconds that training waits, seconds until it is complete, and host memory.

    python -m benchmarks.saving
    python -m benchmarks.saving --size 1.5b

One rank saves a model with optimizer states, in the background of training (`asynchronous`) and while it waits (`synchronous`).
Memory is the sampled growth of the process during the save.
"""

from __future__ import annotations

import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from benchmarks import timing
from benchmarks.setup import SHAPES, TrainStep, bench
from mpo_megatron import device
from mpo_megatron.config import CheckpointConfig
from mpo_megatron.mcore.optimizer_states import fill_states
from mpo_megatron.train.checkpoints.saving import Saver
from mpo_megatron.train.checkpoints.step_folders import RunState, step_folder


def main(arguments: Sequence[str] | None = None) -> None:
    """Save both ways in turn."""
    options = timing.parse(timing.build_parser(__doc__, list(SHAPES)), arguments)
    rows: list[timing.Row] = []
    with bench(options.size) as own, tempfile.TemporaryDirectory() as scratch:
        step = TrainStep(own)
        fill_states(step.adam)
        for side in ("asynchronous", "synchronous"):
            config = CheckpointConfig(keep=1, asynchronous=side == "asynchronous")
            saver = Saver(Path(scratch) / side, config, own.ranks, Path(scratch), 0)
            found = [save(saver, step, number) for number in range(1, options.repeat + 2)][1:]  # the first one is a warm-up
            rows.append(
                {
                    "side": side,
                    **{name: timing.summarize([each[name] for each in found]) for name in ("waits", "seconds", "memory_mib")},
                    "size_mib": found[0]["size_mib"],
                }
            )
    table = [
        {
            "side": row["side"],
            "checkpoint, MiB": f"{row['size_mib']:,.0f}",
            "training waits, s": timing.shown(row["waits"], 3),
            "until complete, s": timing.shown(row["seconds"], 3),
            "host memory, MiB": timing.shown(row["memory_mib"], 0),
        }
        for row in rows
    ]
    note = "Without a GPU: waiting is measured in CPU seconds of the training thread, and weights are copied in host memory."
    timing.report("saving", options, SHAPES[options.size], rows, table, note)


def save(saver: Saver, step: TrainStep, number: int) -> dict[str, Any]:
    """One checkpoint: seconds of `start` and `finish`, seconds in total, and memory growth."""
    clock = time.perf_counter if device.has_gpu() else time.thread_time
    with Memory() as memory:
        device.synchronize()
        began, waited = time.perf_counter(), clock()
        saver.start(RunState(step=number, fixed={}), step.model, step.adam)
        waits = clock() - waited
        while not saver.has_written:
            time.sleep(0.001)
        waited = clock()
        saver.finish()
        waits += clock() - waited
    folder = step_folder(saver.run, number)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return {"waits": waits, "seconds": time.perf_counter() - began, "memory_mib": memory.growth / 2**20, "size_mib": size / 2**20}


class Memory:
    """Within this context, samples the growth of the process's memory."""

    def __init__(self) -> None:
        self.process, self.done = psutil.Process(), threading.Event()
        self.before = self.peak = self.process.memory_info().rss
        self.thread = threading.Thread(target=self._sample, daemon=True)

    @property
    def growth(self) -> int:
        """Bytes of the peak above the start."""
        return self.peak - self.before

    def __enter__(self) -> Memory:
        self.thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.done.set()
        self.thread.join()

    def _sample(self) -> None:
        while not self.done.wait(0.002):
            self.peak = max(self.peak, self.process.memory_info().rss)


if __name__ == "__main__":
    main()

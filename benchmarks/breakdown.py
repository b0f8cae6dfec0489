"""Where a training step's time goes: GEMMs, attention, log-probs, optimizer, communication, the rest; and waiting for data.

    python -m benchmarks.breakdown
    torchrun --nproc-per-node 2 -m benchmarks.breakdown --tensor 2     # with communication in it

Shares come from torch's profiler: every operation's own time goes to the kind of the outermost operation around it that has
one, backward included. On a CPU collectives run in a thread of their own, and what waits for them counts that time, too. Data
wait is measured apart, without the profiler: the wall's time the loop stands still for its next batch, over the step; the
batch is built in a thread meanwhile.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import timing
from benchmarks.setup import SHAPES, TrainStep, bench, make_groups, zero_reference
from mpo_megatron import device
from mpo_megatron.data.group import load_groups, write_groups
from mpo_megatron.data.loader import StepBatch, iterate_steps

DATA = {"tiny": (2, 32, 8, 4, 256), "small": (4, 256, 64, 8, 2048)}
GPU_DATA = (32, 1024, 256, 8, 16384)
"""Groups of a step, prompt tokens, response tokens, responses, tokens of a row."""

OPTIMIZER = "optimizer step"
KINDS = (
    ("optimizer", (OPTIMIZER,)),
    ("log-probs", ("VocabParallel",)),
    ("attention", ("scaled_dot_product", "ScaledDotProduct", "flash", "flex_attention", "FusedAttn", "FlashAttn")),
    ("communication", ("c10d::", "gloo:", "nccl:", "record_param_comms", "ncclDevKernel")),
    ("GEMM", ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "gemm")),
)
"""What marks an operation's name; the outermost mark decides, and the order decides within one name."""
REST = "the rest"


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile a few steps, then time the wait for data in as many."""
    parser = timing.build_parser(__doc__, list(SHAPES), repeat=4)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks, under torchrun")
    options = timing.parse(parser, arguments)
    groups_per_step, prompt, response, responses, row_tokens = DATA.get(options.size, GPU_DATA)
    with bench(options.size, tensor=options.tensor) as own, tempfile.TemporaryDirectory() as folder:
        vocab_size = own.config.vocab_size
        num_steps = options.repeat + 1
        groups = make_groups(
            groups_per_step * num_steps,
            prompt=prompt,
            response=response,
            responses=responses,
            vocab_size=vocab_size,
            spread=0.5,
        )
        # Through the disk, as training reads them.
        write_groups(
            f"{folder}/groups", groups, tokenizer_digest="", vocab_size=vocab_size, end_token_ids=[], reward_kind="scores"
        )
        data = load_groups(f"{folder}/groups")
        step = TrainStep(own)

        def batches() -> Iterator[StepBatch]:
            return iterate_steps(
                range(num_steps),
                data,
                step.objective.select,
                own.shape(row_tokens),
                groups_per_step=groups_per_step,
                seed=0,
                shuffle=True,
            )

        seconds = profile_steps(step, batches(), options.repeat)
        waits, walls = time_waits(step, batches())
        is_main = own.ranks.is_main
        ranks = torch.distributed.get_world_size()
    if not is_main:
        return
    total = sum(seconds.values())
    rows: list[timing.Row] = [{"part": name, "seconds": value, "share": value / total} for name, value in seconds.items()]
    shares = [wait / wall for wait, wall in zip(waits, walls, strict=True)]
    rows.append({"part": "data wait", "share": sum(waits) / sum(walls), "shares": timing.summarize(shares)})
    table = [{"part": row["part"], "share of a step": f"{row['share']:.1%}"} for row in rows]
    settings = {
        "groups_per_step": groups_per_step,
        "prompt": prompt,
        "response": response,
        "responses": responses,
        "row_tokens": row_tokens,
        "ranks": ranks,
        "tensor": options.tensor,
        **SHAPES[options.size],
    }
    note = f"{ranks} rank(s), tensor parallel {options.tensor}; {options.repeat} steps; data wait: of the wall's time of a step."
    name = "breakdown" if ranks == 1 else f"breakdown_{ranks}_ranks"
    timing.report(name, options, settings, rows, table, note)


def profile_steps(step: TrainStep, batches: Iterator[StepBatch], repeat: int) -> dict[str, float]:
    """Seconds of each kind in `repeat` steps, after one that warms up; largest first, the rest last."""
    original = step.update

    def marked() -> None:
        with record_function(OPTIMIZER):
            original()

    step.update = marked  # type: ignore[method-assign]
    batch = next(batches)
    step(batch, zero_reference(batch))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.has_gpu() else [])]
    with profile(activities=activities) as profiler:
        for _ in range(repeat):
            batch = next(batches)
            step(batch, zero_reference(batch))
        device.synchronize()
    step.update = original  # type: ignore[method-assign]
    seconds = dict.fromkeys([kind for kind, _ in KINDS] + [REST], 0.0)
    for event in profiler.events():
        own_time = event.self_device_time_total if device.has_gpu() else event.self_cpu_time_total
        seconds[kind_of(event)] += own_time / 1e6
    rest = seconds.pop(REST)
    return {**dict(sorted(seconds.items(), key=lambda item: -item[1])), REST: rest}


def kind_of(event: Any) -> str:
    """What an operation is part of: the outermost operation around it that carries a mark decides."""
    found = REST
    while event is not None:
        found = next((kind for kind, marks in KINDS if any(mark in event.name for mark in marks)), found)
        event = event.cpu_parent
    return found


def time_waits(step: TrainStep, batches: Iterator[StepBatch]) -> tuple[list[float], list[float]]:
    """Wall seconds that each step waited for its batch, and that it took in all; the first is not counted."""
    waits: list[float] = []
    walls: list[float] = []
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - started
        if batch is None:
            return waits[1:], walls[1:]
        step(batch, zero_reference(batch))
        device.synchronize()
        waits.append(waited)
        walls.append(time.perf_counter() - started)


if __name__ == "__main__":
    main()

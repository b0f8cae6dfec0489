"""The parts of a training step's time: GEMMs, attention, log-probs, optimizer, communication, the rest; and waiting for data.

    python -m benchmarks.breakdown
    torchrun --nproc-per-node 2 -m benchmarks.breakdown --tensor 2     # with communication in it
    python -m benchmarks.breakdown --size 3b --attention flex          # one GPU, another attention kernel

Shares come from torch's profiler: every operation's own time (on a GPU, that of the kernels it starts) counts for the kind of its
outermost enclosing operation with a kind, backward included; a kernel without one counts by its own name. On a CPU, collectives
run in threads of their own, which are left out: communication is the time that a rank waits for them, and so for slower ranks.
The rest is measured separately, without the profiler, as shares of wall time: data wait (how long the loop waits for its next
batch, which a thread builds meanwhile), and on a GPU its idle time and MFU, the rate of the step's operations over the GPU's
peak (padding counts, recomputation does not).
"""

from __future__ import annotations

import contextlib
import dataclasses
import tempfile
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.distributed import Work
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import timing
from benchmarks.setup import SHAPES, TrainStep, bench, make_groups, model_config, zero_reference
from mpo_megatron import device
from mpo_megatron.data.loader import StepBatch, iterate_steps
from mpo_megatron.data.store import load_groups
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.model.attention_backends import choose_attention
from mpo_megatron.train.throughput import peak_flops

DATA = {"tiny": (2, 32, 8, 4, 256), "small": (4, 256, 64, 8, 2048), "wide": (4, 256, 64, 8, 2048)}
GPU_DATA = (32, 1024, 256, 8, 16384)
"""Groups of a step, prompt tokens, response tokens, responses, tokens of a row."""

OPTIMIZER = "optimizer step"
WAIT = "wait for ranks"
KINDS = (
    ("optimizer", (OPTIMIZER,)),
    ("log-probs", ("VocabParallel",)),
    ("attention", ("scaled_dot_product", "ScaledDotProduct", "flash", "flex_attention", "FusedAttn", "FlashAttn")),
    ("communication", (WAIT, "c10d::", "nccl:", "record_param_comms", "ncclDevKernel")),
    ("GEMM", ("aten::mm", "aten::addmm", "aten::bmm", "aten::matmul", "aten::linear", "gemm", "nvjet", "splitKreduce")),
)
"""Marks in the name of an operation or a kernel (`nvjet` are cuBLAS's on Hopper); the outermost mark counts, and within one name
the first in this order."""
REST = "the rest"


def main(arguments: Sequence[str] | None = None) -> None:
    """Profile a few steps, then time the wait for data in as many."""
    parser = timing.build_parser(__doc__, list(SHAPES), repeat=4)
    parser.add_argument("--tensor", type=int, default=1, help="tensor-parallel ranks, under torchrun")
    parser.add_argument("--attention", choices=("auto", "sdpa", "flex", "varlen"), default="auto", help="as model.attention")
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
        # Through the disk, as in training.
        write_groups(
            f"{folder}/groups", groups, tokenizer_digest="", vocab_size=vocab_size, end_token_ids=[], reward_kind="scores"
        )
        data = load_groups(f"{folder}/groups")
        model = dataclasses.replace(model_config(), attention=options.attention)
        step = TrainStep(own, own.wrap(own.build_policy(model)))

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
        waits, walls, operations = time_steps(step, batches())
        is_main = own.ranks.is_main
        ranks = torch.distributed.get_world_size()
    if not is_main:
        return
    total = sum(seconds.values())
    rows: list[timing.Row] = [{"part": name, "seconds": value, "share": value / total} for name, value in seconds.items()]
    shares = [wait / wall for wait, wall in zip(waits, walls, strict=True)]
    rows.append({"part": "data wait", "share": sum(waits) / sum(walls), "shares": timing.summarize(shares)})
    if device.has_gpu():
        rows.append({"part": "GPU idle", "share": 1 - total / options.repeat / (sum(walls) / len(walls))})
    peak = peak_flops(device.gpu_name())
    if peak is not None:
        rows.append({"part": "MFU", "share": sum(operations) / options.tensor / sum(walls) / peak})
    table = [{"part": row["part"], "share of a step": f"{row['share']:.1%}"} for row in rows]
    settings = {
        "groups_per_step": groups_per_step,
        "prompt": prompt,
        "response": response,
        "responses": responses,
        "row_tokens": row_tokens,
        "ranks": ranks,
        "tensor": options.tensor,
        "attention": choose_attention(model),
        **SHAPES[options.size],
    }
    note = (
        f"{ranks} rank(s), tensor parallel {options.tensor}; {options.repeat} steps of {sum(walls) / len(walls):.2f} s; the "
        "lines from data wait on are shares of that time."
    )
    name = "breakdown" if ranks == 1 else f"breakdown_{ranks}_ranks"
    timing.report(name, options, settings, rows, table, note)


def profile_steps(step: TrainStep, batches: Iterator[StepBatch], repeat: int) -> dict[str, float]:
    """Seconds of each kind in `repeat` steps, after a warm-up step; largest first, the rest last."""
    original = step.update

    def marked() -> None:
        with record_function(OPTIMIZER):
            original()

    step.update = marked  # type: ignore[method-assign]
    batch = next(batches)
    step(batch, zero_reference(batch))
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.has_gpu() else [])]
    with marked_waits(), profile(activities=activities) as profiler:
        for _ in range(repeat):
            batch = next(batches)
            step(batch, zero_reference(batch))
        device.synchronize()
    step.update = original  # type: ignore[method-assign]
    seconds = dict.fromkeys([kind for kind, _ in KINDS] + [REST], 0.0)
    for event in profiler.events():
        if not device.has_gpu() and not event.name.startswith("gloo:"):  # these run in gloo's threads, while the rank's waits
            seconds[kind_of(event)] += event.self_cpu_time_total / 1e6
        for kernel in event.kernels:
            if kernel.name != event.name:  # for a `record_function`, it spans from the first kernel to the last
                seconds[kind_of(event, kernel.name)] += kernel.duration / 1e6
    rest = seconds.pop(REST)
    return {**dict(sorted(seconds.items(), key=lambda item: -item[1])), REST: rest}


@contextlib.contextmanager
def marked_waits() -> Iterator[None]:
    """Within this context, each wait for a collective is an operation of its own for the profiler."""
    collective: Any = Work
    original = collective.wait

    def wait(work: Work, *arguments: Any, **options: Any) -> Any:
        with record_function(WAIT):
            return original(work, *arguments, **options)

    collective.wait = wait
    try:
        yield
    finally:
        collective.wait = original


def kind_of(event: Any, kernel: str = "") -> str:
    """The kind of an operation, or of its kernel: decided by the outermost enclosing operation with a mark."""
    names = [kernel]
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    marked = (kind for name in reversed(names) for kind, marks in KINDS if any(mark in name for mark in marks))
    return next(marked, REST)


def time_steps(step: TrainStep, batches: Iterator[StepBatch]) -> tuple[list[float], list[float], list[int]]:
    """Wall seconds that each step waited for its batch, its total seconds, and its operations; the first step is not counted."""
    waits: list[float] = []
    walls: list[float] = []
    operations: list[int] = []
    while True:
        started = time.perf_counter()
        batch = next(batches, None)
        waited = time.perf_counter() - started
        if batch is None:
            return waits[1:], walls[1:], operations[1:]
        step(batch, zero_reference(batch))
        device.synchronize()
        waits.append(waited)
        walls.append(time.perf_counter() - started)
        operations.append(step.bench.count(batch.rows))


if __name__ == "__main__":
    main()

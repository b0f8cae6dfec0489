"""Whether work grows at most linearly with its input: CPU seconds, and for some of it memory, at several sizes.

    python -m benchmarks.growth
    python -m benchmarks.growth --work losses attention

    report      read a run's folder and build the page's content, by steps (an evaluation of 100 groups every 50 steps)
    rows        plan the rows of a step, by groups and replicas
    losses      every loss with its default hyper-parameters, forward and backward, by responses of a group
    step        a training step at equal tokens, by responses of a group
    attention   one row and one head, forward and backward, by tokens, and by window (0: none)

`benchmarks.rounds` and `benchmarks.preparing` measure the stages' data.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from benchmarks import timing
from benchmarks.logprobs import PeakMemory
from benchmarks.setup import TrainStep, bench, make_batch, make_groups, zero_reference
from mpo_megatron.data.outcomes import GroupOutcome, write_outcomes
from mpo_megatron.data.packing import plan_rows
from mpo_megatron.files.digests import seal_line
from mpo_megatron.losses import GroupBatch, list_losses
from mpo_megatron.model.attention import ScoreSettings, row_layout
from mpo_megatron.model.attention_cpu import cpu_row_attention
from mpo_megatron.report.content import content
from mpo_megatron.report.held_out import Limits
from mpo_megatron.report.run_record import read_run

SIZES: dict[str, dict[str, tuple[tuple[int, ...], ...]]] = {
    "tiny": {"report": ((100,),), "rows": ((16, 2),), "losses": ((4,),), "step": ((4,),), "attention": ((256, 64),)},
    "small": {
        "report": ((1_000,), (20_000,), (100_000,)),
        "rows": ((1_024, 128), (8_192, 1), (8_192, 1_024)),
        "losses": ((8,), (64,), (512,)),
        "step": ((2,), (8,), (64,)),
        "attention": ((4_096, 0), (16_384, 0), (32_768, 0), (4_096, 4_096), (16_384, 4_096), (32_768, 4_096)),
    },
}
IN_PROCESS = ("losses", "step", "attention")
"""Work that runs in a process of its own, to measure its memory."""
RESPONSES, GROUPS, EVERY = 8, 100, 50
BATCH, TOKENS = 16, 2_048
METRICS = (
    *("loss", "accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio", "kl", "grad_norm", "lr", "skipped_groups"),
    *("tokens_per_second", "seconds", "data_wait", "step_seconds_max_over_mean", "slowest_rank", "peak_memory_gib"),
)


class Case(NamedTuple):
    """One piece of work at one size."""

    work: str
    size: tuple[int, ...]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every piece of work at every size."""
    parser = timing.build_parser(__doc__, tuple(SIZES), repeat=3)
    parser.add_argument("--work", choices=list(SIZES["tiny"]), nargs="+", default=list(SIZES["tiny"]), help="what to measure")
    options = timing.parse(parser, arguments)
    cases = [Case(work, size) for work in options.work for size in SIZES[options.size][work]]
    with tempfile.TemporaryDirectory() as scratch:
        rows = timing.measure_each("growth", options, cases, lambda case: measure(case, Path(scratch), options))
    table = [
        {
            "work": row["work"],
            "size": row["size"],
            "CPU s": timing.shown(row["cpu"], 3),
            "memory, MiB": f"{row['mib']:,.0f}" if "mib" in row else "",
        }
        for row in rows
    ]
    note = (
        f"report: steps; rows: groups of {RESPONSES} responses × replicas, in rows of 8,192 tokens; losses: responses of {BATCH} "
        f"groups; step: responses, of {TOKENS:,} response tokens in all; attention: tokens × window. Memory: peak beyond imports."
    )
    timing.report("growth", options, {"responses": RESPONSES, "groups": GROUPS}, rows, table, note)


def measure(case: Case, scratch: Path, options: argparse.Namespace) -> timing.Row:
    """CPU seconds of one piece of work, and its peak memory."""
    row: timing.Row = {"work": case.work, "size": " × ".join(f"{size:,}" for size in case.size)}
    if case.work in IN_PROCESS:
        here, there = multiprocessing.Pipe()
        process = multiprocessing.get_context("fork").Process(target=_serve, args=(there, case, options), daemon=True)
        process.start()
        there.close()
        seconds, row["mib"] = here.recv()
        process.join()
    else:
        seconds = clock(report_work(scratch, *case.size) if case.work == "report" else rows_work(*case.size), options.repeat)
    return row | {"cpu": timing.summarize(seconds)}


def clock(work: Callable[[], object], repeat: int) -> list[float]:
    """CPU seconds of each run."""
    seconds = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return seconds


def _serve(connection: Connection, case: Case, options: argparse.Namespace) -> None:
    """In a forked process: send the seconds of each run but the first, and the peak memory of all."""
    peak = PeakMemory()
    if case.work == "step":
        seconds = step_seconds(case.size[0], options)
    else:
        seconds = clock(losses_work(*case.size) if case.work == "losses" else attention_work(*case.size), options.repeat + 1)
    connection.send((seconds[1:], peak.mib()))


def losses_work(responses: int) -> Callable[[], object]:
    """Compute every loss of some groups, and its gradient."""
    draw = torch.Generator().manual_seed(0)
    shape, tokens = (BATCH, responses), 8

    def logps(*size: int) -> torch.Tensor:
        return -100 * torch.rand(*size, generator=draw)

    def work() -> None:
        for loss in list_losses():
            batch = GroupBatch(
                policy_logps=logps(*shape).requires_grad_(),
                valid=torch.ones(shape, dtype=torch.bool),
                reference_logps=logps(*shape),
                rewards=torch.randn(shape, generator=draw),
                lengths=torch.full(shape, tokens),
                token_logps=logps(*shape, tokens).requires_grad_(),
                reference_token_logps=logps(*shape, tokens),
                generator=draw,
            )
            loss.compute(batch, loss.params()).sum().backward()

    return work


def attention_work(tokens: int, window: int) -> Callable[[], object]:
    """Attention of one row with one head of 64 channels."""
    query, key, value = (torch.randn(tokens, 1, 64, requires_grad=True) for _ in range(3))
    scores = ScoreSettings(window=window or None)

    def work() -> None:
        cpu_row_attention(query, key, value, row_layout([(0, tokens, 0, 0)]), scores).sum().backward()

    return work


def step_seconds(responses: int, options: argparse.Namespace) -> list[float]:
    """CPU seconds of training steps with prompts and responses of 32 tokens."""
    with bench(options.size) as own:
        step = TrainStep(own)
        groups = make_groups(
            max(1, TOKENS // 32 // responses),
            prompt=32,
            response=32,
            responses=responses,
            vocab_size=own.config.vocab_size,
        )
        batch = make_batch(groups, step.objective, own.shape(4096))
        reference = zero_reference(batch)
        return clock(lambda: step(batch, reference), options.repeat + 1)


def report_work(scratch: Path, steps: int) -> Callable[[], object]:
    """Build the content of the page of a run with this many steps."""
    folder, draw = scratch / str(steps), np.random.default_rng(0)
    folder.mkdir()
    with (folder / "metrics.jsonl").open("wb") as file:
        for step in range(1, steps + 1):
            file.write(seal_line({"step": step, **dict(zip(METRICS, draw.random(len(METRICS)).tolist(), strict=True))}))
            if step % EVERY == 0:
                held_out = {f"eval/{name}": value for name, value in zip(METRICS[:6], draw.random(6).tolist(), strict=True)}
                file.write(seal_line({"step": step, **held_out}))
    for step in range(EVERY, steps + 1, EVERY):
        logps = draw.random((2, GROUPS, RESPONSES)).tolist()
        outcomes = [
            GroupOutcome(
                index=index,
                group_id=str(index),
                policy_logps=tuple(logps[0][index]),
                reference_logps=tuple(logps[1][index]),
                sets=(1, 0) * (RESPONSES // 2),
            )
            for index in range(GROUPS)
        ]
        write_outcomes(folder, step, outcomes, "digest")
    return lambda: content([read_run(folder)], Limits(GROUPS, 16, 100))


def rows_work(groups: int, replicas: int) -> Callable[[], object]:
    """Plan the rows of a step."""
    draw = np.random.default_rng(0)
    prompts = draw.integers(50, 500, groups).tolist()
    lengths = draw.integers(10, 800, (groups, RESPONSES)).tolist()
    scored = np.ones((groups, RESPONSES), dtype=bool)
    return lambda: plan_rows(prompts, lengths, scored, row_tokens=8_192, num_replicas=replicas, layout="shared", pair_weight=1e-4)


if __name__ == "__main__":
    main()

"""Whether work outside the models grows at most linearly with its input: CPU seconds at several sizes.

    python -m benchmarks.growth

`report` reads a run's folder and builds the page's content, by the number of steps (an evaluation of 100 groups every 50 steps);
`rows` plans the rows of a step, by groups and replicas. `benchmarks.rounds` and `benchmarks.preparing` measure the stages' data.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from benchmarks import timing
from mpo_megatron.data.outcomes import GroupOutcome, write_outcomes
from mpo_megatron.data.packing import plan_rows
from mpo_megatron.files.digests import seal_line
from mpo_megatron.report.content import content
from mpo_megatron.report.held_out import Limits
from mpo_megatron.report.run_record import read_run

STEPS = {"tiny": (100,), "small": (1_000, 20_000, 100_000)}
"""Steps of a run, by size."""
ROWS = {"tiny": ((16, 2),), "small": ((1_024, 128), (8_192, 1), (8_192, 1_024))}
"""Groups per step, and replicas."""
RESPONSES, GROUPS, EVERY = 8, 100, 50
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
    options = timing.parse(timing.build_parser(__doc__, tuple(STEPS), repeat=3), arguments)
    cases = [Case("report", (steps,)) for steps in STEPS[options.size]]
    cases += [Case("rows", size) for size in ROWS[options.size]]
    with tempfile.TemporaryDirectory() as scratch:
        rows = timing.measure_each("growth", options, cases, lambda case: measure(case, Path(scratch), options.repeat))
    table = [{"work": row["work"], "size": row["size"], "CPU s": timing.shown(row["cpu"], 2)} for row in rows]
    note = f"report: steps; rows: groups of {RESPONSES} responses × replicas, in rows of 8,192 tokens."
    timing.report("growth", options, {"responses": RESPONSES, "groups": GROUPS}, rows, table, note)


def measure(case: Case, scratch: Path, repeat: int) -> timing.Row:
    """CPU seconds of one piece of work."""
    work = report_work(scratch, *case.size) if case.work == "report" else rows_work(*case.size)
    seconds = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        seconds.append(time.process_time() - began)
    return {"work": case.work, "size": " × ".join(f"{size:,}" for size in case.size), "cpu": timing.summarize(seconds)}


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

"""The planner against published runs: the table is complete, errors are within the goals, and the guide shows current plans."""

from __future__ import annotations

import datetime
import functools
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.published import BOUNDS, EFFICIENCIES, Priced, Run, describe, fit, load_table
from mpo_megatron.config import ParallelConfig
from mpo_megatron.config.parallel import check_ranks
from mpo_megatron.families.published import MODELS
from mpo_megatron.plan.hardware import TABLE
from mpo_megatron.plan.memory_layout import GIB

SOURCES, RUNS = load_table()
GUIDE = Path(__file__).parents[3] / "docs" / "experiments" / "planning.md"


@functools.cache
def price(index: int) -> Priced:
    return Priced(RUNS[index])


def name(run: Run) -> str:
    return f"{run.name} on {run.gpus} {run.hardware}"


@pytest.mark.parametrize("run", RUNS, ids=name)
def test_the_table_is_whole(run: Run) -> None:
    assert run.source in SOURCES
    assert datetime.date(2022, 1, 1) < run.date < datetime.date.today()
    assert run.hardware in TABLE
    assert (run.tokens_per_second is None) != (run.tflops is None)
    assert (run.model in MODELS) != (run.fields is not None)
    assert set(run.overlapped) <= {"tensor", "context", "expert"}
    assert not run.deduplicated or run.kind == "experts"
    check_ranks(ParallelConfig(**run.parallel), run.gpus)
    sizes = math.prod(run.parallel.get(axis, 1) for axis in ("tensor", "pipeline", "context"))
    assert run.batch % (run.gpus // sizes * run.micro_batch) == 0, "replicas have as many rows"


def test_there_are_enough_of_every_kind() -> None:
    assert len(RUNS) >= 15
    assert set(SOURCES) == {run.source for run in RUNS}
    assert {"none", "current", "mxfp8"} == {run.fp8 for run in RUNS}
    assert sum(run.kind == "experts" for run in RUNS) >= 5


@pytest.mark.parametrize("index", range(len(RUNS)), ids=[name(run) for run in RUNS])
def test_the_plan_meets_what_was_published_and_the_guide_says_so(index: int) -> None:
    item = price(index)
    assert abs(item.residual()) <= BOUNDS[item.run.kind]
    cells = list(describe(item, None).values())
    lines = [line for line in GUIDE.read_text(encoding="utf-8").splitlines() if line.startswith("| " + " | ".join(cells[:5]))]
    assert lines == [line for line in lines if line.startswith(f"| {' | '.join(cells)} |")], cells
    assert lines


def test_the_weak_scalings_rows_fit() -> None:
    """Its source does not give the micro-batch: four sequences are possible."""
    for index, run in enumerate(RUNS):
        if run.source == "weak":
            item = price(index)
            assert max(stage.total for stage in item.placed.stages) < TABLE[run.hardware].memory_gib * GIB


def test_a_fit_finds_the_efficiencies_again() -> None:
    """Fitted to the planner's own times, from another start."""
    found = [price(index) for index, run in enumerate(RUNS) if run.hardware == "h100" and run.batch <= 1024]
    true = dict(zip(EFFICIENCIES, (0.6, 0.7, 0.5, 0.8), strict=True))
    planned = [item.price(true).seconds for item in found]
    for item, seconds in zip(found, planned, strict=True):
        vars(item)["published_seconds"] = seconds
    try:
        again = fit(found, dict.fromkeys(EFFICIENCIES, 0.5))
    finally:
        for item in found:
            del vars(item)["published_seconds"]
    assert np.allclose(list(again.values()), list(true.values()), rtol=1e-3)

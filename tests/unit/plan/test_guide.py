"""The tables of docs/experiments/planning.md equal today's plans."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mpo_megatron.config import ParallelConfig, TrainConfig, load_yaml
from mpo_megatron.plan.figures import summarize
from mpo_megatron.plan.memory_layout import GIB
from mpo_megatron.plan.plan import build_problem
from mpo_megatron.plan.search import Candidate, Workload
from tests.unit.plan.test_recipes import RECIPES, build_plan

GUIDE = (
    (Path(__file__).parents[3] / "docs" / "experiments" / "planning.md")
    .read_text(encoding="utf-8")
    .partition("## Qwen3-32B on 64")[2]
)
RECIPE = RECIPES / "mpo_on_policy" / "qwen3-32b" / "train.yaml"
TOLERANCE = 0.02
"""Tolerance of a number beyond its rounding: small changes of packing need no update."""


def evaluate(train: TrainConfig, gpus: int, groups_per_step: int, fp8: str | None = None) -> tuple[Workload, Candidate]:
    """The recipe's run on this many GPUs."""
    if fp8:
        train = dataclasses.replace(train, model=dataclasses.replace(train.model, fp8=fp8))  # type: ignore[arg-type]
    problem = build_problem(build_plan(RECIPE, gpus=gpus, groups_per_step=groups_per_step), train)
    return problem, problem.evaluate(train.parallel, train.model.recompute, train.data.row_tokens)


def rows(pattern: str) -> list[list[str]]:
    """Cells of the table rows that match."""
    lines = [line for line in GUIDE.splitlines() if re.match(pattern, line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def check(written: str, value: float) -> None:
    digits = len(written.split()[0].partition(".")[2])
    number = float(written.split()[0].replace(",", ""))
    assert value == pytest.approx(number, rel=TOLERANCE, abs=0.51 * 10**-digits), written


def test_memory() -> None:
    train, found = load_yaml(TrainConfig, RECIPE), rows(r"\| (64|512) GPUs, data|\| +\| \d \|")
    assert len(found) == 4
    for first in (0, 2):
        gpus = int(found[first][0].split()[0])
        _, candidate = evaluate(train, gpus, 2 * gpus)
        for stage, (_, number, *cells) in zip(candidate.stages, found[first : first + 2], strict=True):
            assert int(number) == stage.stage
            parts = (
                stage.weights,
                stage.gradients,
                stage.optimizer,
                stage.activations,
                stage.working,
                stage.overhead,
                stage.total,
            )
            for cell, part in zip(cells, parts, strict=True):
                check(cell, part / GIB)


def test_weak_scaling() -> None:
    train, found = load_yaml(TrainConfig, RECIPE), rows(r"\| \d+(, FP8 .*)? \| [\d,]+ \|")
    assert len(found) == 5
    first = None
    for gpus, groups, *cells, mfu, efficiency in found:
        fp8 = re.search(r"`(\w+)`", gpus)
        problem, candidate = evaluate(train, int(gpus.split(",")[0]), int(groups.replace(",", "")), fp8[1] if fp8 else None)
        time, run = candidate.time, summarize(problem, candidate, 60_000)
        parts = (time.seconds, time.compute, time.elementwise, time.tensor, time.bubble, time.data, run["groups_per_second"])
        for cell, part in zip(cells, parts, strict=True):
            check(cell, part)
        check(mfu, 100 * run["mfu"])
        first = first or run["groups_per_second"] / problem.gpus
        if efficiency:
            check(efficiency, 100 * run["groups_per_second"] / problem.gpus / first)


def test_what_the_text_says() -> None:
    train = load_yaml(TrainConfig, RECIPE)
    apart = dataclasses.replace(train, optimizer=dataclasses.replace(train.optimizer, overlap="none"))
    (without,) = re.findall(r"without overlap a step takes ([\d.]+) s", GUIDE)
    check(without, evaluate(apart, 512, 1024)[1].time.seconds)
    ((seconds, mfu),) = re.findall(r"([\d.]+) s per step and (\d+) % MFU", GUIDE)
    problem, candidate = evaluate(train, 512, 128)
    check(seconds, candidate.time.seconds)
    check(mfu, 100 * summarize(problem, candidate, 60_000)["mfu"])
    (deep,) = re.findall(r"estimated at ([\d.]+) s", GUIDE)
    short = dataclasses.replace(
        train,
        parallel=ParallelConfig(tensor=8, pipeline=8, virtual_pipeline=4),
        data=dataclasses.replace(train.data, row_tokens=4096),
    )
    check(deep, evaluate(short, 512, 128)[1].time.seconds)


def by_hand(*, tensor: int, pipeline: int) -> list[int]:
    """Parameters on a rank of each stage of Qwen3-32B, from the numbers in its config.json."""
    hidden, layers, heads, groups, channels, ffn, vocabulary = 5120, 64, 64, 8, 128, 25600, 151936
    padded = -(-vocabulary // 128) * 128
    matrices = hidden * (heads + 2 * groups) * channels + heads * channels * hidden + 3 * hidden * ffn
    layer = matrices // tensor + 2 * hidden + 2 * channels
    stages = [layers // pipeline * layer] * pipeline
    stages[0] += padded * hidden // tensor
    stages[-1] += padded * hidden // tensor + hidden
    return stages


@pytest.mark.parametrize(("tensor", "pipeline", "gpus"), [(8, 2, 64), (4, 4, 32), (8, 1, 8)])
def test_weights_gradients_and_states_by_hand(tensor: int, pipeline: int, gpus: int) -> None:
    train = dataclasses.replace(load_yaml(TrainConfig, RECIPE), parallel=ParallelConfig(tensor=tensor, pipeline=pipeline))
    _, candidate = evaluate(train, gpus, 2 * gpus)
    replicas = gpus // tensor // pipeline
    for stage, parameters in zip(candidate.stages, by_hand(tensor=tensor, pipeline=pipeline), strict=True):
        assert (stage.weights, stage.gradients) == (2 * parameters, 4 * parameters)
        assert stage.optimizer == 12 * parameters // replicas


def test_operations_by_hand() -> None:
    """Six operations per weight and token; twelve per attending pair, layer and query channel.

    Source: Narayanan et al. 2021, §5.1, without recomputation and with the actual pairs instead of T².
    """
    _, candidate = evaluate(load_yaml(TrainConfig, RECIPE), 64, 128)
    hidden, layers, queries, keys, ffn, vocabulary = 5120, 64, 64 * 128, 8 * 128, 25600, 151936
    weights = layers * (hidden * (2 * queries + 2 * keys) + 3 * hidden * ffn)
    steps = [
        sum(6 * weights * row.tokens + 12 * layers * queries * row.pairs + 6 * hidden * vocabulary * row.scored for row in step)
        for step in candidate.packed.sums
    ]
    assert candidate.time.model_flops == pytest.approx(sum(steps) / len(steps), rel=1e-12)

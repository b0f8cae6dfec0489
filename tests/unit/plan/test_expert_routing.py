"""The plan includes the costs of expert routing: the choices' bytes, the maps that the losses keep, the second pass."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from mpo_megatron.config import (
    ConfigError,
    DataConfig,
    ExpertsConfig,
    LossConfig,
    ModelConfig,
    ParallelConfig,
    PlanConfig,
    TrainConfig,
)
from mpo_megatron.plan.figures import cached_groups, choices_on_disk, summarize
from mpo_megatron.plan.plan import build_problem, plan
from mpo_megatron.plan.search import Workload

LAYOUT = ParallelConfig(tensor=4, expert=8)
CHOICES = 48 * 8
"""Bytes per token of Qwen3-30B-A3B: 48 layers, 8 of 128 experts."""


def build(model: str = "Qwen3-30B-A3B", loss: LossConfig | None = None, **experts: object) -> Workload:
    config = PlanConfig(model=model, gpus=8, groups_per_step=32, groups=1000, spread=0.0, responses=4)
    train = TrainConfig(
        output="run",
        model=ModelConfig(checkpoint="model"),
        data=DataConfig(train="groups"),
        loss=loss or LossConfig(),
        experts=ExpertsConfig(**experts),  # type: ignore[arg-type]
    )
    return build_problem(config, train)


def test_choices_take_a_byte_each() -> None:
    tokens = 512 + 4 * 511  # prompt, and responses without their last
    assert choices_on_disk(build(routing="replay"), 1000)["choices_gb"] == pytest.approx(1000 * tokens * CHOICES / 1e9, rel=1e-3)
    assert choices_on_disk(build(model="Mixtral-8x7B", measure_drift=True), 1000)["choices_gb"] == pytest.approx(
        1000 * tokens * 32 * 2 / 1e9, rel=1e-3
    )
    assert choices_on_disk(build(), 1000) == {}
    divergence = LossConfig(name="spo", params={"regularizer": "token_kl", "regularizer_weight": 0.1})
    assert choices_on_disk(build(loss=divergence, routing="replay"), 1000) == {}  # a resident reference keeps them in memory
    replay = build(routing="replay").evaluate(LAYOUT, "full", 8192)
    free = build().evaluate(LAYOUT, "full", 8192)
    step = 8192 * max(len(rows[0]) for rows in replay.packed.rows)
    for stage, other in zip(replay.stages, free.stages, strict=True):  # two replicas; a rank has a quarter of its rows' tokens
        assert stage.total - other.total == pytest.approx((2 + 1 / 4) * step * CHOICES, rel=0.01)


def test_the_reference_pass_is_planned_for_what_a_run_reaches() -> None:
    problem = build()
    assert [cached_groups(problem, groups) for groups in (64, 1000, 3000)] == [64, 1000, 1000]
    figures = summarize(problem, problem.evaluate(LAYOUT, "full", 8192), 64)
    assert figures["reference_hours"] == pytest.approx(
        64 / 32 * problem.evaluate(LAYOUT, "full", 8192).time.forward_seconds / 3600
    )
    free = build(loss=LossConfig(name="simpo"))
    assert cached_groups(free, 64) == 0
    assert summarize(free, free.evaluate(LAYOUT, "full", 8192), 64)["reference_hours"] == 0
    assert cached_groups(build(loss=LossConfig(name="simpo"), measure_drift=True), 64) == 64  # its choices are included


def test_losses_of_routers_keep_maps_of_tokens_and_experts() -> None:
    free, balanced = build(), build(balance_coeff=0.1, z_coeff=0.1)
    kept = [problem.evaluate(LAYOUT, "none", 8192).stages[0].activations for problem in (free, balanced)]
    assert kept[1] - kept[0] == 3 * 4 * 128 * (8192 // 4) * 48
    times = [
        problem.evaluate(LAYOUT, "none", 8192).time.compute
        for problem in (free, balanced, build(balance_coeff=0.1, balance_over="step"))
    ]
    assert times[0] == times[1]
    assert times[2] > 1.2 * times[0]  # a forward pass comes first


def test_the_command_names_the_disk_and_refuses_dense_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "train.yaml"
    run.write_text(
        "output: run\nmodel: {checkpoint: model}\ndata: {train: groups}\n"
        "parallel: {tensor: 4, expert: 8}\nexperts: {routing: replay}\n"
    )
    config = PlanConfig(model="Qwen3-30B-A3B", gpus=8, hardware="h200", train=str(run), groups_per_step=8, groups=1000, suggest=0)
    plan(config)
    assert "the reference's expert choices take 1." in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"experts.routing = replay, but the model of model.checkpoint has no experts"):
        plan(dataclasses.replace(config, model="Qwen2.5-7B"))

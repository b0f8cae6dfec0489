"""OnMC-PO's plan: the rounds of `mpo iterate` as segments of one training run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError, ConvertConfig, IterateConfig
from mpo_megatron.model.convert import convert
from mpo_megatron.rollout.round_report import read_last_metrics
from mpo_megatron.rollout.rounds import build_plan, start_training
from tests.tiny import save_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    save_model(folder / "hf", num_hidden_layers=2, hidden_size=32)
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "megatron")))
    return folder / "megatron"


def config(model: Path, tmp_path: Path, *, train: dict[str, Any] | None = None, **changes: Any) -> IterateConfig:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Question {index}?"}) + "\n" for index in range(26)))
    options: dict[str, Any] = {"reference": "initial", "optimizer": "continued", **changes}
    return IterateConfig(
        output=str(tmp_path / "out"),
        model=str(model),
        prompts=str(prompts),
        rounds=3,
        held_out=4,
        score={"scorers": {"short": {"kind": "regex", "pattern": "a"}}},
        train={"loss": {"name": "mcpo"}, "data": {"groups_per_step": 3}, **(train or {})},
        **options,
    )


def test_segments_follow_each_other_in_one_run(model: Path, tmp_path: Path) -> None:
    plan = build_plan(config(model, tmp_path))
    assert [len(rows) for rows in plan.prompts.rounds] == [8, 7, 7]
    trains = [start_training(plan, item, tmp_path / "elsewhere") for item in plan.rounds]
    assert [(train.data.first_step, train.stop_after) for train in trains] == [(0, 3), (3, 6), (6, 9)]
    assert {train.max_steps for train in trains} == {9}  # one schedule over all
    assert {train.output for train in trains} == {str(tmp_path / "out" / "run")}
    assert len({train.seed for train in trains}) == 1
    assert {train.model.checkpoint for train in trains} == {str(model)}
    assert [Path(train.data.train).parent.name for train in trains] == ["01", "02", "03"]
    # Candidates come from the policy as it is at the segment's start.
    assert [Path(item.generate.model).parent.name for item in plan.rounds] == ["00", "01", "02"]


def test_a_given_number_of_steps_is_divided_equally(model: Path, tmp_path: Path) -> None:
    plan = build_plan(config(model, tmp_path, train={"max_steps": 10}))
    assert [(item.train.data.first_step, item.train.stop_after) for item in plan.rounds] == [(0, 3), (3, 7), (7, 10)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "previous"}, "set reference to initial"),
        ({"per_round": {"train.optimizer.lr": [1e-6, 1e-6, 1e-6]}}, r"per_round\.train\.optimizer\.lr"),
        ({"train": {"max_steps": 2}}, r"train\.max_steps = 2"),
        ({"train": {"stop_after": 2}}, r"train\.stop_after is set by mpo iterate"),
    ],
)
def test_refusals(model: Path, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_plan(config(model, tmp_path, **changes))


def test_a_round_reports_its_own_last_step(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "loss": 1.0 / step}) + "\n" for step in range(1, 7)))
    assert read_last_metrics(path, 3) == {"step": 3, "loss": 1 / 3}
    assert read_last_metrics(path, None) == {"step": 6, "loss": 1 / 6}

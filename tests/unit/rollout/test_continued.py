"""OnMC-PO: the rounds of `mpo iterate` as segments of one training run; their plan, and kills in every stage."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from rich.console import Console

from mpo_megatron.config import ConfigError, IterateConfig, TrainConfig, parse
from mpo_megatron.data import prepare as preparing
from mpo_megatron.files import DataError
from mpo_megatron.model import convert_export
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.rollout import iterate as rounds
from mpo_megatron.rollout import records, stages
from mpo_megatron.rollout import score as scoring
from mpo_megatron.rollout import select as selecting
from mpo_megatron.rollout.round_report import read_last_metrics
from mpo_megatron.rollout.rounds import build_plan, start_training
from mpo_megatron.train import loop
from mpo_megatron.train.checkpoints import saving
from mpo_megatron.train.checkpoints.step_folders import complete_steps
from tests.kills import Killed, raise_at
from tests.training import train


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
    # Candidates come from the policy at the segment's start.
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
    path.unlink()
    with pytest.raises(DataError, match=r"metrics\.jsonl no longer exists"):
        read_last_metrics(path, None)


# --------------------------------------------------------------------------------------------------- kills


def train_here(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
    """Training in this process instead of under torchrun."""
    assert train(parse(TrainConfig, arguments)) is None
    return 0


KILLS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "first segment, at its second step": lambda patch: raise_at(loop, "take_step", 1, patch),
    "first segment, its last checkpoint written and not named": lambda patch: raise_at(saving, "appear", 0, patch),
    "first segment, trained and not noted": lambda patch: patch.setattr(
        rounds, "find_megatron_checkpoint", Mock(side_effect=Killed)
    ),
    "export": lambda patch: raise_at(convert_export, "write_shards", 0, patch),
    "generate": lambda patch: raise_at(records.LineWriter, "write", 5, patch),
    "score, between its two files": lambda patch: raise_at(scoring, "write_summary", 1, patch),
    "select": lambda patch: raise_at(selecting, "plot_spacing", 0, patch),
    "prepare": lambda patch: raise_at(preparing, "_write", 0, patch),
    "second segment, before its first step": lambda patch: raise_at(loop, "take_step", 0, patch),
    "second segment, between its steps": lambda patch: raise_at(loop, "take_step", 1, patch),
    "second segment, before it is reported": lambda patch: raise_at(rounds, "report_round", 1, patch),
    "third segment, at its first step": lambda patch: raise_at(loop, "take_step", 0, patch),
    "last report": lambda patch: raise_at(rounds, "write_report", 0, patch),
}
"""In sequence: after each kill, the same command resumes and reaches the next."""


def small(model: Path, folder: Path) -> IterateConfig:
    (folder / "vowels.py").write_text("def vowels(response, group):\n    return sum(c in 'aeiou' for c in response) / 8\n")
    return replace(
        config(model, folder, measure_kl=False),
        held_out=2,
        held_out_responses=2,
        generate={"num_responses": 4, "max_tokens": 8, "empty": "keep"},
        score={"scorers": {"vowels": {"kind": "function", "function": f"{folder / 'vowels.py'}:vowels"}}},
        select={"truncated": "keep", "duplicates": "keep"},
        train={
            "model": {"precision": "fp32"},
            "data": {"groups_per_step": 2, "row_tokens": 256},
            "optimizer": {"lr": 1e-3},
            "loss": {"name": "mcpo", "params": {"beta": 0.1, "num_negatives": 1}},
            "checkpoint": {"every": 1, "keep": 1, "asynchronous": False},
            "max_steps": 6,
            "eval_every": 0,
        },
    )


def tensors(run: Path) -> dict[str, torch.Tensor]:
    """Weights and optimizer states of a run's newest checkpoint."""
    reader = CheckpointReader(complete_steps(run)[-1] / "megatron")
    return {key: reader.read(key, [0] * len(entry.size), list(entry.size)) for key, entry in reader.tensors.items()}


@pytest.mark.slow
def test_segments_that_are_killed_in_every_stage_end_alike(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "launch", train_here)
    quiet = Console(quiet=True)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
    rounds.iterate(small(model, tmp_path / "whole"), quiet)
    for arm in KILLS.values():
        with pytest.MonkeyPatch.context() as patch:
            arm(patch)
            with pytest.raises(Killed):
                rounds.iterate(small(model, tmp_path / "killed"), quiet)
    rounds.iterate(small(model, tmp_path / "killed"), quiet)
    whole, killed = (tmp_path / name / "out" for name in ("whole", "killed"))
    expected, found = tensors(whole / "run"), tensors(killed / "run")
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    assert any(key.startswith("optimizer.") for key in expected)
    for name in ("rounds/02/selected/groups.jsonl", "rounds/03/scored/scored.jsonl", "policies/03/scored/scored.jsonl"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert (whole / "report.json").read_bytes() == (killed / "report.json").read_bytes()
    steps = [json.loads(line)["step"] for line in (killed / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4, 5, 6]

"""Metrics of a step, against values worked out by hand; averages do not depend on how data was cut."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch

from mpo_megatron.config import ConfigError, LoggingConfig
from mpo_megatron.losses import GroupBatch, build_params
from mpo_megatron.train.metrics import Mean, combine, compute_metrics
from mpo_megatron.train.tracking import JsonlTracker, ProgressLine, build_trackers, check_installed


def batch(policy: list[list[float]], reference: list[list[float]], rewards: list[list[float]]) -> GroupBatch:
    policy_logps = torch.tensor(policy, dtype=torch.float64)
    return GroupBatch(
        policy_logps=policy_logps,
        reference_logps=torch.tensor(reference, dtype=torch.float64),
        rewards=torch.tensor(rewards, dtype=torch.float64),
        valid=torch.ones_like(policy_logps, dtype=torch.bool),
    )


def values(groups: GroupBatch, contributes: list[bool], computed: torch.Tensor | None = None) -> dict[str, float]:
    losses = torch.arange(1.0, len(contributes) + 1) * torch.tensor(contributes)
    everything = torch.ones_like(groups.valid) if computed is None else computed
    return {
        name: mean.value
        for name, mean in compute_metrics(groups, losses, torch.tensor(contributes), everything, object()).items()
    }


def test_by_hand() -> None:
    groups = batch([[-1, -4, -9], [-5, -5, -5]], [[-3, -3, -3], [-5, -5, -5]], [[1, 0, 0], [1, 1, 1]])
    result = values(groups, [True, False])
    # s = (2, −1, −6); Y+ = {0}, Y− = {1, 2}; the second group has no contrast.
    assert result == pytest.approx(
        {"loss": 1.0, "margin": 5.5, "accuracy": 1.0, "chosen_log_ratio": 2.0, "rejected_log_ratio": -3.5, "kl": 5 / 3}
    )


def test_accuracy_counts_pairs_and_ties_half() -> None:
    # Y+ = {0, 1}, Y− = {2, 3}; s = (1, 0, 0, −1): pairs 1>0, 1>−1, 0=0, 0>−1.
    groups = batch([[1, 0, 0, -1]], [[0, 0, 0, 0]], [[2, 2, 1, 1]])
    assert values(groups, [True])["accuracy"] == pytest.approx(3.5 / 4)


def test_rounding_is_a_tie() -> None:
    groups = batch([[-100 + 1e-6, -100]], [[-100, -100]], [[1, 0]])
    assert values(groups, [True])["accuracy"] == 0.5


def test_responses_that_were_not_computed_do_not_count() -> None:
    groups = batch([[2, 0, 99]], [[0, 0, 0]], [[2, 1, 0]])
    result = values(groups, [True], torch.tensor([[True, True, False]]))
    assert result["margin"] == pytest.approx(2.0)
    assert result["kl"] == pytest.approx(-1.0)


def test_a_pairwise_loss_on_labels_has_metrics() -> None:
    groups = batch([[2, 0]], [[0, 0]], [[0, 0]])
    groups = dataclasses.replace(groups, rewards=None, labels=torch.tensor([[0, 1]]))
    metrics = compute_metrics(groups, torch.ones(1), torch.tensor([True]), groups.valid, build_params("dpo", {}))
    assert metrics["margin"].value == pytest.approx(-2.0)


def test_combined_averages_weigh_by_count() -> None:
    assert combine([{"loss": Mean(2.0, 1)}, {"loss": Mean(4.0, 3)}]) == {"loss": 1.5}
    assert math.isnan(Mean(0.0, 0).value)


def test_resumed_metrics_file_drops_later_and_broken_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = JsonlTracker(path, start_step=0)
    for step in range(1, 5):
        first.log(step, {"loss": float(step), "margin": math.nan})
    first.close()
    with path.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    resumed = JsonlTracker(path, start_step=2)
    resumed.log(3, {"loss": 30.0})
    resumed.close()
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [(line["step"], line["loss"]) for line in lines] == [(1, 1.0), (2, 2.0), (3, 30.0)]
    assert lines[0]["margin"] is None


def test_tensorboard_and_wandb_keep_and_continue_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    logging = LoggingConfig(tensorboard=True, wandb_project="test")
    ids = []
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        trackers = build_trackers(logging, tmp_path, {"seed": 1}, start_step=start, total_steps=4)
        for tracker in trackers[:3]:
            for step in steps:
                tracker.log(step, {"loss": 10.0 * start + step})
        for tracker in trackers:
            tracker.close()
        ids.append((tmp_path / "wandb_run_id").read_text())
    assert ids[0] == ids[1]
    accumulator = events.EventAccumulator(str(tmp_path / "tensorboard"))
    accumulator.Reload()
    assert [(event.step, event.value) for event in accumulator.Scalars("loss")] == [(1, 1), (2, 2), (3, 23), (4, 24)]


def test_a_tracker_that_is_not_installed_is_refused_early(monkeypatch: pytest.MonkeyPatch) -> None:
    check_installed(LoggingConfig())
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"logging\.wandb_project is set, but wandb is not installed"):
        check_installed(LoggingConfig(wandb_project="test"))


def test_progress_shows_steps_evaluations_and_skipped_steps(capsys: pytest.CaptureFixture[str]) -> None:
    line = ProgressLine(total_steps=3, start_step=0)
    learned = {"loss": 0.5, "accuracy": 0.75, "margin": 1.0, "lr": 1e-6, "grad_norm": 2.0, "tokens_per_second": 100.0}
    line.log(1, learned | {"skipped_groups": 2})
    line.log(2, {"lr": 1e-6, "grad_norm": 0.0, "tokens_per_second": 0.0, "skipped_groups": 8})
    line.log(2, {"eval/loss": 0.25, "eval/accuracy": 0.9, "eval/margin": 3.0})
    line.close()
    shown = capsys.readouterr().out
    assert "step 1/3  loss 0.5000  accuracy 0.750" in shown
    assert "step 2/3  skipped: none of its 8 groups carries a contrast" in shown
    assert "step 2/3  held-out: loss 0.2500  accuracy 0.9000" in shown

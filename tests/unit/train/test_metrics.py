"""Metrics of a step, against values worked out by hand; averages do not depend on the split of the data."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from mpo_megatron.losses import GroupBatch, build_params
from mpo_megatron.train.metrics import Mean, combine, compute_metrics


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

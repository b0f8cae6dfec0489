"""Metrics of a step as sums and counts, so that averages do not depend on how the data was split.

Legend: G groups of a step, K responses of a group.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpo_megatron.losses import GroupBatch, PartitionParams, compute_partition

ROUNDING = 1e-6
"""Relative rounding error of a response's log-prob: float32 has 6e-8, and errors of some tens of tokens add up."""


REFERENCE_METRICS = ("margin", "accuracy", "chosen_log_ratio", "rejected_log_ratio", "kl")
"""Metrics that compare with the reference."""


@dataclass(frozen=True)
class Mean:
    """A running mean."""

    total: float
    count: float

    @property
    def value(self) -> float:
        """total / count; NaN if empty."""
        return self.total / self.count if self.count else float("nan")


def compute_metrics(batch: GroupBatch, losses: Tensor, contributes: Tensor, computed: Tensor, params: object) -> dict[str, Mean]:
    """Learning metrics of a step, over its contributing groups; only `loss` for a batch without reference log-probs.

    With s = log π_θ − log π_ref of a response, and Y+, Y− by the loss's own partition (else by the mean reward, or the labels):

    - `loss`: nats, mean over groups
    - `margin`: mean of s over Y+ minus mean of s over Y−, mean over groups; nats
    - `accuracy`: share of pairs Y+ × Y− with s of the preferred one larger; a tie counts half
    - `chosen_log_ratio`, `rejected_log_ratio`: mean of s over Y+ and over Y−, mean over groups; nats
    - `kl`: mean of −s over all responses, an estimate of KL(π_ref ‖ π_θ) if responses are samples of π_ref; nats

    Args:
        losses: [G]
        contributes: [G] groups with contrast
        computed: [G, K] responses whose log-probs were computed
        params: hyper-parameters of the loss
    """
    loss = Mean(float(losses.sum()), int(contributes.sum()))
    if batch.reference_logps is None:
        return {"loss": loss}
    ratio = batch.policy_logps.detach().double() - batch.reference_logps.double()
    positive, negative = compute_sets(batch, params)
    use = contributes[:, None] & computed
    positive, negative = positive & use, negative & use
    both = positive.any(dim=1) & negative.any(dim=1)
    chosen, rejected = _masked_mean(ratio, positive)[both], _masked_mean(ratio, negative)[both]
    # Where policy and reference agree, the difference is the rounding of two float32 sums: a tie, not an order.
    rounding = ROUNDING * batch.policy_logps.detach().double().abs()
    right, num_pairs = count_right(ratio - rounding, ratio + rounding, positive, negative)
    return {
        "loss": loss,
        "margin": Mean(float((chosen - rejected).sum()), int(both.sum())),
        "accuracy": Mean(right, num_pairs),
        "chosen_log_ratio": Mean(float(chosen.sum()), int(both.sum())),
        "rejected_log_ratio": Mean(float(rejected.sum()), int(both.sum())),
        "kl": Mean(float(-ratio[use].sum()), int(use.sum())),
    }


def count_right(low: Tensor, high: Tensor, positive: Tensor, negative: Tensor) -> tuple[float, int]:
    """Pairs Y+ × Y− of all groups in the right order, a tie as a half, and all pairs; by sorting, since there are up to K² / 4.

    Args:
        low: [G, K] least value of each response
        high: [G, K] greatest value; two responses are tied if their intervals touch
        positive: [G, K] Y+
        negative: [G, K] Y−
    """
    count = negative.sum(dim=1, keepdim=True)
    highs, lows = (torch.where(negative, part, torch.inf).sort(dim=1).values for part in (high, low))
    above = torch.searchsorted(highs, low.contiguous())  # of Y−, those that are lower
    below = count - torch.searchsorted(lows, high.contiguous(), right=True)
    right = torch.where(positive, count + above - below, 0)
    return int(right.sum()) / 2, int((positive.sum(dim=1, keepdim=True) * count).sum())


def combine(parts: Iterable[dict[str, Mean]]) -> dict[str, float]:
    """Averages over several steps."""
    totals: dict[str, tuple[float, float]] = defaultdict(lambda: (0.0, 0.0))
    for part in parts:
        for name, mean in part.items():
            total, count = totals[name]
            totals[name] = (total + mean.total, count + mean.count)
    return {name: Mean(*total).value for name, total in totals.items()}


def compute_sets(batch: GroupBatch, params: object) -> tuple[Tensor, Tensor]:
    """(Y+, Y−), each [G, K] bool: by the loss's own partition, else by the mean reward, or the labels."""
    # A pairwise loss has a partition by reward even if it reads labels and there are no rewards.
    if isinstance(params, PartitionParams) and (batch.rewards is not None or params.partition == "labels"):
        return compute_partition(batch, params)
    return compute_partition(batch, PartitionParams(partition="labels" if batch.rewards is None else "mean"))


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, values, 0.0).sum(dim=1) / mask.sum(dim=1).clamp(min=1)

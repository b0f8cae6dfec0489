"""Split a group's responses into preferred (Y+) and others (Y−). Shapes: G groups, K responses."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch
from mpo_megatron.losses.hyperparameters import Count, Hyperparameters, check_unused
from mpo_megatron.losses.registry import Needs

PartitionName = Literal["mean", "median", "trimmed_mean", "top_bottom", "one_vs_rest", "labels"]
TRIMMED_SHARE = 0.1  # mpo A.3: "removing top/bottom 10%"


@dataclass(frozen=True, kw_only=True)
class PartitionParams(Hyperparameters):
    """Hyper-parameters of every loss that splits a group into two sets."""

    partition: PartitionName = "mean"
    """How a group is split: above its mean | median | 10 %-trimmed mean; the num_top best against the num_bottom worst; the best
    against the rest; or by the data's labels."""
    num_top: Count = 2
    """Size of Y+ with partition = top_bottom (mpo §6: 2 of 5)."""
    num_bottom: Count = 2
    """Size of Y− with partition = top_bottom."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.partition != "top_bottom":
            check_unused(self, "partition = top_bottom", "num_top", "num_bottom")


def compute_partition(batch: GroupBatch, params: PartitionParams) -> tuple[Tensor, Tensor]:
    """Masks (Y+, Y−), each [G, K] bool, disjoint; both all False for a group without contrast (either set
    empty, or all rewards equal).

    Ties: thresholds compare each reward with one number, so equal rewards share a set, in any order of the responses.
    `top_bottom` and `one_vs_rest` break ties by index, lower index first. A group with fewer than num_top + num_bottom responses
    has no contrast under `top_bottom`.

    Source: mpo §4.1, §4.4, §6, A.3, App. I; swepo Eq. 3–4.
    """
    if params.partition == "labels":
        if batch.labels is None:
            raise ValueError("labels = None; partition = labels reads the sets from the data; pass labels [G, K].")
        positive = batch.valid & (batch.labels == 1)
        negative = batch.valid & (batch.labels == 0)
    else:
        if batch.rewards is None:
            raise ValueError(
                f"rewards = None; partition = {params.partition} compares rewards; pass rewards, or set partition = labels."
            )
        # Half-precision rewards are compared exactly: a tolerance for their rounding would blur real differences.
        precision = torch.finfo(torch.float64 if batch.rewards.dtype == torch.float64 else torch.float32).eps
        positive, negative = split_by_reward(batch.rewards.double(), batch.valid, params, precision)
    contrast = positive.any(dim=-1, keepdim=True) & negative.any(dim=-1, keepdim=True)
    return positive & contrast, negative & contrast


def split_by_reward(rewards: Tensor, valid: Tensor, params: PartitionParams, precision: float) -> tuple[Tensor, Tensor]:
    """(Y+, Y−) from rewards [G, K] in float64, before groups without contrast are removed.

    Args:
        precision: relative rounding of a single reward
    """
    if params.partition in ("mean", "median", "trimmed_mean"):
        # A reward that mathematically equals the threshold, such as 0.4 among 1, 0.4 (five times), 0.2 and 0, must not exceed it
        # through the rounding of a sum of K terms.
        largest = torch.where(valid, rewards.abs(), 0.0).amax(dim=-1, keepdim=True)
        rounding = 2 * rewards.shape[-1] * precision * largest
        positive = rewards - compute_threshold(rewards, valid, params.partition).unsqueeze(-1) > rounding
        return valid & positive, valid & ~positive
    rank = compute_rank(rewards, valid)
    count = valid.sum(dim=-1, keepdim=True)
    num_top, num_bottom = params.num_top, params.num_bottom
    if params.partition == "one_vs_rest":
        num_top, num_bottom = 1, rewards.shape[-1]
    positive = valid & (rank < num_top)
    negative = valid & (rank >= torch.clamp(count - num_bottom, min=num_top))
    enough = count >= (num_top + num_bottom if params.partition == "top_bottom" else 2)
    splittable = enough & has_distinct_rewards(rewards, valid).unsqueeze(-1)
    return positive & splittable, negative & splittable


def compute_threshold(rewards: Tensor, valid: Tensor, statistic: str) -> Tensor:
    """Mean, median (of an even count: midway between the middle two) or 10 %-trimmed mean of each group's rewards, [G].

    Rewards are sorted and summed one after the other in float64, so the order of responses and padding do not change the sum: a
    reward equal to the mean stays on the same side.
    """
    ordered = torch.where(valid, rewards, torch.inf).sort(dim=-1).values  # padding last
    count = valid.sum(dim=-1, keepdim=True)
    position = torch.arange(rewards.shape[-1], device=rewards.device)
    dropped = torch.zeros_like(count)
    if statistic == "median":
        dropped = torch.clamp((count - 1) // 2, min=0)
    elif statistic == "trimmed_mean":
        dropped = (count * TRIMMED_SHARE).long()
    kept = (position >= dropped) & (position < count - dropped)
    total = torch.where(kept, ordered, 0.0).cumsum(dim=-1)[..., -1]
    return total / kept.sum(dim=-1).clamp(min=1)


def compute_rank(rewards: Tensor, valid: Tensor) -> Tensor:
    """Rank [G, K] of each response by reward: 0 the highest, equal rewards by index, padding last."""
    order = torch.where(valid, rewards, -torch.inf).sort(dim=-1, descending=True, stable=True).indices
    return order.argsort(dim=-1)


def has_distinct_rewards(rewards: Tensor, valid: Tensor) -> Tensor:
    """[G] bool: the group has two valid responses with different rewards."""
    highest = torch.where(valid, rewards, -torch.inf).amax(dim=-1)
    lowest = torch.where(valid, rewards, torch.inf).amin(dim=-1)
    return highest > lowest


def compute_deviations(batch: GroupBatch) -> Tensor:
    """S_i − S̄ [G, K] in float64, S̄ the mean over the group's valid responses; 0 at padding."""
    if batch.rewards is None:
        raise ValueError("rewards = None; this loss weighs responses by their reward's deviation; pass rewards [G, K].")
    rewards = batch.rewards.double()
    return torch.where(batch.valid, rewards - compute_threshold(rewards, batch.valid, "mean").unsqueeze(-1), 0.0)


def find_partitioned(batch: GroupBatch, params: PartitionParams) -> Tensor:
    """[G, K] bool: responses in Y+ or Y−."""
    positive, negative = compute_partition(batch, params)
    return positive | negative


def needs_partition(params: PartitionParams) -> Needs:
    """Needs of a partitioned loss with a reference policy."""
    by_label = params.partition == "labels"
    return Needs(reference=True, rewards=not by_label, labels=by_label)

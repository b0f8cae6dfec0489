"""Pairs (winner, loser) inside a group, for the pairwise losses.

Pairs are a mask [G, W, L] over winners W and losers L: a pairwise loss is a formula in broadcast tensors [G, W, 1] and [G, 1, L],
reduced over that mask. W and L are the K responses, or 1 where `pairing` leaves a group one winner or loser, so that work and
memory are those of the pairs. Equal rewards never form a pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, draw_uniform
from mpo_megatron.losses.hyperparameters import check_unused
from mpo_megatron.losses.numerics import masked_mean
from mpo_megatron.losses.partition import PartitionParams, compute_partition, compute_rank, has_distinct_rewards
from mpo_megatron.losses.registry import Needs


@dataclass(frozen=True, kw_only=True)
class PairParams(PartitionParams):
    """Hyper-parameters of every pairwise loss. `partition` counts only with pairing = cross_pairs."""

    pairing: Literal["best_worst", "best_random", "best_vs_each", "all_pairs", "cross_pairs"] = "best_worst"
    """Best against worst | a random worse one | each worse one (DPO×(K−1)); every ordered pair (DPO×C(K,2)); Y+ × Y−."""
    reduction: Literal["mean", "sum"] = "mean"
    """Over a group's pairs: mean gives groups equal weight, sum gives pairs equal weight."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pairing != "cross_pairs":
            check_unused(self, "pairing = cross_pairs", "partition")


def compute_preferences(batch: GroupBatch) -> tuple[Tensor, Tensor]:
    """Scores to order responses by, [G, K] float64, and which responses have one, [G, K] bool: the rewards,
    or without rewards the labels (1 above 0; −1 has none)."""
    if batch.rewards is not None:
        return batch.rewards.double(), batch.valid
    if batch.labels is not None:
        return batch.labels.double(), batch.valid & (batch.labels >= 0)
    raise ValueError("rewards = None, labels = None; this loss orders responses; pass rewards or labels [G, K].")


def compute_better(batch: GroupBatch) -> Tensor:
    """[G, W, L] bool: response W is strictly preferred to response L."""
    scores, usable = compute_preferences(batch)
    comparable = usable.unsqueeze(-1) & usable.unsqueeze(-2)
    return comparable & (scores.unsqueeze(-1) > scores.unsqueeze(-2))


def find_worse_than_best(batch: GroupBatch) -> Tensor:
    """[G, K] bool: responses with a strictly lower score than the best."""
    scores, usable = compute_preferences(batch)
    return usable & (scores < torch.where(usable, scores, -torch.inf).amax(dim=-1, keepdim=True))


def find_best(batch: GroupBatch) -> Tensor:
    """[G, K] bool: the one response with the highest score, the first of equals."""
    scores, usable = compute_preferences(batch)
    return usable & (compute_rank(scores, usable) == 0)


def find_worst(batch: GroupBatch) -> Tensor:
    """[G, K] bool: the one response with the lowest score, the first of equals."""
    scores, usable = compute_preferences(batch)
    return usable & (compute_rank(-scores, usable) == 0)


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The pairs of each group, and values of their responses in the pairs' shape."""

    mask: Tensor
    """[G, W, L] bool."""
    winner: Tensor | None = None
    """[G, K] bool: the group's only winner, W = 1; None: W = K."""
    loser: Tensor | None = None
    """[G, K] bool: the group's only loser, L = 1; None: L = K."""
    reduction: str
    """`mean` or `sum`, over a group's pairs."""

    def winners(self, values: Tensor) -> Tensor:
        """[G, W, 1] from [G, K]."""
        return pick(values, self.winner).unsqueeze(-1)

    def losers(self, values: Tensor) -> Tensor:
        """[G, 1, L] from [G, K]."""
        return pick(values, self.loser).unsqueeze(-2)

    def margins(self, scores: Tensor) -> Tensor:
        """Score of the winner − score of the loser, [G, W, L] from [G, K]."""
        return self.winners(scores) - self.losers(scores)

    def reduce(self, losses: Tensor) -> Tensor:
        """Mean (or sum) of pair losses [G, W, L] over each group's pairs, [G]; 0 for a group without pairs."""
        if self.reduction == "sum":
            return torch.where(self.mask, losses, 0.0).sum(dim=(-2, -1))
        return masked_mean(losses, self.mask, dim=(-2, -1))


def pick(values: Tensor, only: Tensor | None) -> Tensor:
    """The value of each group's only such response, [G, 1], 0 where there is none; all values [G, K] for None."""
    return values if only is None else torch.where(only, values, 0.0).sum(dim=-1, keepdim=True)


def compute_pairs(batch: GroupBatch, params: PairParams) -> Pairs:
    """The pairs in the loss; best_random draws one loser per group, uniformly, from the generator."""
    if params.pairing in ("all_pairs", "cross_pairs"):
        return Pairs(mask=compute_many_pairs(batch, params), reduction=params.reduction)
    best, losers = find_best(batch), find_losers(batch, params)
    if params.pairing == "best_vs_each":
        return Pairs(mask=losers.unsqueeze(-2), winner=best, reduction=params.reduction)
    if params.pairing == "best_random":
        noise = torch.where(losers, draw_uniform(batch), -1.0)
        losers = losers & (compute_rank(noise, losers) == 0)
    mask = losers.any(dim=-1)[..., None, None]
    return Pairs(mask=mask, winner=best, loser=losers, reduction=params.reduction)


def compute_many_pairs(batch: GroupBatch, params: PairParams) -> Tensor:
    """[G, K, K] bool: all ordered pairs, or those of Y+ × Y−."""
    if params.pairing == "all_pairs":
        return compute_better(batch)
    positive, negative = compute_partition(batch, params)
    pairs = positive.unsqueeze(-1) & negative.unsqueeze(-2)
    # Labels take precedence over rewards; top_bottom and one_vs_rest may separate equal rewards.
    return pairs if params.partition == "labels" else pairs & compute_better(batch)


def find_losers(batch: GroupBatch, params: PairParams) -> Tensor:
    """[G, K] bool: the losers of pairs with the best response, before sampling."""
    worse = find_worse_than_best(batch)
    return worse & find_worst(batch) if params.pairing == "best_worst" else worse


def find_paired(batch: GroupBatch, params: PairParams) -> Tensor:
    """[G, K] bool: responses in any pair, before sampling."""
    scores, usable = compute_preferences(batch)
    if params.pairing == "all_pairs":
        return usable & has_distinct_rewards(scores, usable).unsqueeze(-1)
    if params.pairing == "cross_pairs":
        positive, negative = compute_partition(batch, params)
        if params.partition == "labels":
            return positive | negative
        highest = torch.where(positive, scores, -torch.inf).amax(dim=-1, keepdim=True)
        lowest = torch.where(negative, scores, torch.inf).amin(dim=-1, keepdim=True)
        return (positive & (scores > lowest)) | (negative & (scores < highest))
    losers = find_losers(batch, params)
    return losers | (find_best(batch) & losers.any(dim=-1, keepdim=True))


def needs_pairs(params: PairParams) -> Needs:
    """Needs of a pairwise loss without a reference policy."""
    sampled = params.pairing == "best_random"
    if params.pairing != "cross_pairs":
        return Needs(preferences=True, sampled=sampled)
    return Needs(labels=params.partition == "labels", rewards=params.partition != "labels")


def needs_reference_pairs(params: PairParams) -> Needs:
    """Needs of a pairwise loss with a reference policy."""
    return replace(needs_pairs(params), reference=True)

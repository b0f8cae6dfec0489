"""Pairs (winner, loser) inside a group, for the pairwise losses.

Pairs are a mask [G, W, L] over winner index W and loser index L (both run over the K responses): a pairwise
loss is a formula in broadcast tensors [G, K, 1] and [G, 1, K], reduced over that mask. Equal rewards never form a pair.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, draw_uniform
from mpo_megatron.losses.hyperparameters import check_unused
from mpo_megatron.losses.numerics import masked_mean
from mpo_megatron.losses.partition import PartitionParams, compute_partition, compute_rank
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


def find_best(batch: GroupBatch) -> Tensor:
    """[G, K] bool: the one response with the highest score, the first of equals."""
    scores, usable = compute_preferences(batch)
    return usable & (compute_rank(scores, usable) == 0)


def find_worst(batch: GroupBatch) -> Tensor:
    """[G, K] bool: the one response with the lowest score, the first of equals."""
    scores, usable = compute_preferences(batch)
    return usable & (compute_rank(-scores, usable) == 0)


def compute_candidate_pairs(batch: GroupBatch, params: PairParams) -> Tensor:
    """[G, W, L] bool: pairs before sampling; for best_random, all candidates."""
    if params.pairing == "cross_pairs":
        positive, negative = compute_partition(batch, params)
        pairs = positive.unsqueeze(-1) & negative.unsqueeze(-2)
        # Labels take precedence over rewards; top_bottom and one_vs_rest may separate equal rewards.
        return pairs if params.partition == "labels" else pairs & compute_better(batch)
    better = compute_better(batch)
    if params.pairing == "all_pairs":
        return better
    best_first = better & find_best(batch).unsqueeze(-1)
    if params.pairing == "best_worst":
        return best_first & find_worst(batch).unsqueeze(-2)
    return best_first


def compute_pairs(batch: GroupBatch, params: PairParams) -> Tensor:
    """[G, W, L] bool: the pairs in the loss; best_random draws one loser per group, uniformly, from the generator."""
    pairs = compute_candidate_pairs(batch, params)
    if params.pairing != "best_random":
        return pairs
    losers = pairs.any(dim=-2)
    noise = torch.where(losers, draw_uniform(batch), -1.0)
    drawn = losers & (compute_rank(noise, losers) == 0)
    return pairs & drawn.unsqueeze(-2)


def find_paired(batch: GroupBatch, params: PairParams) -> Tensor:
    """[G, K] bool: responses in any pair, before sampling."""
    pairs = compute_candidate_pairs(batch, params)
    return pairs.any(dim=-1) | pairs.any(dim=-2)


def compute_margins(scores: Tensor) -> Tensor:
    """score of W − score of L, [G, W, L] from [G, K]."""
    return scores.unsqueeze(-1) - scores.unsqueeze(-2)


def reduce_pairs(batch: GroupBatch, params: PairParams, losses: Tensor) -> Tensor:
    """Mean (or sum) of pair losses [G, W, L] over each group's pairs, [G]; 0 for a group without pairs."""
    pairs = compute_pairs(batch, params)
    if params.reduction == "sum":
        return torch.where(pairs, losses, 0.0).sum(dim=(-2, -1))
    return masked_mean(losses, pairs, dim=(-2, -1))


def needs_pairs(params: PairParams) -> Needs:
    """Needs of a pairwise loss without a reference policy."""
    sampled = params.pairing == "best_random"
    if params.pairing != "cross_pairs":
        return Needs(preferences=True, sampled=sampled)
    return Needs(labels=params.partition == "labels", rewards=params.partition != "labels")


def needs_reference_pairs(params: PairParams) -> Needs:
    """Needs of a pairwise loss with a reference policy."""
    return replace(needs_pairs(params), reference=True)

"""Listwise losses: the whole ranking of a group (Plackett–Luce), and the best response against the set of the others.

Shapes: G groups, K responses. Units: nats per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios
from mpo_megatron.losses.hyperparameters import Count, Hyperparameters, Positive, require
from mpo_megatron.losses.numerics import masked_logsumexp
from mpo_megatron.losses.pairing import compute_better, compute_preferences, find_best
from mpo_megatron.losses.partition import compute_rank, has_distinct_rewards
from mpo_megatron.losses.registry import Needs, register
from mpo_megatron.losses.setwise import contrast_sets


def find_ranked(batch: GroupBatch, params: Any) -> Tensor:
    """[G, K] bool: the responses that have a score, in groups where not all scores are equal."""
    scores, usable = compute_preferences(batch)
    return usable & has_distinct_rewards(scores, usable).unsqueeze(-1)


def find_worse_than_best(batch: GroupBatch) -> Tensor:
    """[G, K] bool: responses with a strictly lower score than the best."""
    return (compute_better(batch) & find_best(batch).unsqueeze(-1)).any(dim=-2)


def sort_by_preference(batch: GroupBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` [G, K] from the best response to the worst (ties by index), and which places are filled, [G, K] bool."""
    scores, usable = compute_preferences(batch)
    order = compute_rank(scores, usable).argsort(dim=-1)
    return values.gather(-1, order), usable.gather(-1, order)


def mask_suffixes(filled: Tensor, first: int) -> Tensor:
    """[G, K, K] bool: for each place k the filled places j ≥ k + first."""
    place = torch.arange(filled.shape[-1], device=filled.device)
    return filled.unsqueeze(-2) & (place.unsqueeze(0) >= place.unsqueeze(1) + first)


def compute_choice_terms(ordered: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Plackett–Luce: −log( e^{z_k} / Σ_{j ≥ k} e^{z_j} ) for each place k, and the places that have such a
    choice (a filled place below them), both [G, K]. Computed as −log σ(z_k − log Σ_{j > k} e^{z_j}), which
    keeps small losses' digits."""
    rest = mask_suffixes(filled, first=1)
    rest_logsumexp = masked_logsumexp(ordered.unsqueeze(-2), rest)
    return -F.logsigmoid(ordered - rest_logsumexp), rest.any(dim=-1) & filled


@dataclass(frozen=True, kw_only=True)
class ListwiseParams(Hyperparameters):
    """Hyper-parameters of `plackett_luce`."""

    beta: Positive = 0.01
    """Scale of the log-ratios (mpo's tables)."""


RANKING_NEEDS = Needs(reference=True, preferences=True)


@register(
    "plackett_luce",
    params=ListwiseParams,
    scored=find_ranked,
    needs=RANKING_NEEDS,
    source="DPO, App. A.3; MPO, App. I",
)
def compute_plackett_luce(batch: GroupBatch, params: ListwiseParams) -> Tensor:
    """Ranking DPO: −Σ_k [β s_(k) − log Σ_{j ≥ k} e^{β s_(j)}], (k) the k-th best response; summed over the places.

    Equal rewards are ordered by index.
    Source: DPO (Rafailov et al. 2023), App. A.3; MPO, App. I.
    """
    terms, present = compute_choice_terms(*sort_by_preference(batch, params.beta * compute_log_ratios(batch)))
    return torch.where(present, terms, 0.0).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class SdpoParams(Hyperparameters):
    """Hyper-parameters of `sdpo`."""

    beta: Positive = 1.0
    """Scale of the log-ratios."""
    form: Literal["best", "ranked"] = "best"
    """Compare the best response with all worse ones, or every response with all that are worse than it (spo App. D.2)."""


def find_best_and_worse(batch: GroupBatch, params: Any) -> Tensor:
    """[G, K] bool: the best response and all strictly worse ones; empty where none is worse."""
    worse = find_worse_than_best(batch)
    return worse | (find_best(batch) & worse.any(dim=-1, keepdim=True))


def find_contrasted(batch: GroupBatch, params: SdpoParams) -> Tensor:
    """[G, K] bool: the responses that `form` compares."""
    return find_ranked(batch, params) if params.form == "ranked" else find_best_and_worse(batch, params)


@register(
    "sdpo",
    params=SdpoParams,
    scored=find_contrasted,
    needs=RANKING_NEEDS,
    source="S-DPO (Chen et al. 2024); SPO, App. D.2 (ranked)",
)
def compute_sdpo(batch: GroupBatch, params: SdpoParams) -> Tensor:
    """S-DPO: −log σ( −log Σ_l e^{β (s_l − s_w)} ), w the best response, l every strictly worse one; ranked: summed over all w.

    Ranked, without equal rewards, it is `plackett_luce`: each of its terms is a place's.
    Source: S-DPO (Chen et al. 2024, "On softmax direct preference optimization for recommendation"); SPO, App. D.2, which takes
    each of the first three of four ranks as the positive response.
    """
    logits = params.beta * compute_log_ratios(batch)
    if params.form == "best":
        return contrast_sets(logits, find_best(batch), find_worse_than_best(batch))
    better = compute_better(batch)  # [G, W, L]
    terms = -F.logsigmoid(logits - masked_logsumexp(logits.unsqueeze(-2), better))
    return torch.where(better.any(dim=-1), terms, 0.0).sum(dim=-1)


@dataclass(frozen=True, kw_only=True)
class BinnedMpoParams(Hyperparameters):
    """Hyper-parameters of `mpo_bins`."""

    beta: Positive = 0.01
    """Scale of the log-ratios (mpo's tables)."""
    num_bins: Count = 3
    """Number of bins of the ranking, as equal in size as possible: 2 is the upper half against all, K is `plackett_luce`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.num_bins >= 2, f"num_bins = {self.num_bins}; it must be at least 2.")


@register(
    "mpo_bins",
    params=BinnedMpoParams,
    scored=find_ranked,
    needs=RANKING_NEEDS,
    source="MPO, Fig. 7 and Theorem 2 (intermediate bins)",
)
def compute_binned_mpo(batch: GroupBatch, params: BinnedMpoParams) -> Tensor:
    """MPO with more than two bins: −Σ_b log( Σ_{bin b} e^z / Σ_{bins ≥ b} e^z ), z = β s, over all bins but the last.

    The k-th best of n responses is in bin ⌊k·B / n⌋ (k from 0); with n < B each has its own. Equal rewards are ordered by index.
    Deviation: the paper does not specify how it splits a ranking into bins; equal sizes are assumed.
    Source: MPO, Fig. 7: hybrid models between MPO's two bins and Plackett–Luce's K.
    """
    ordered, filled = sort_by_preference(batch, params.beta * compute_log_ratios(batch))
    count = filled.sum(dim=-1, keepdim=True)
    place = torch.arange(ordered.shape[-1], device=ordered.device)
    bins = torch.where(count < params.num_bins, place, place * params.num_bins // count.clamp(min=1))
    total = torch.zeros_like(ordered[..., 0])
    for number in range(min(params.num_bins, ordered.shape[-1]) - 1):
        own, below = filled & (bins == number), filled & (bins > number)
        total = total + torch.where(below.any(dim=-1), contrast_sets(ordered, own, below), 0.0)
    return total

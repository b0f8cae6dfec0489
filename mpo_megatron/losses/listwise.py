"""Listwise losses: the whole ranking of a group (Plackett–Luce), and the best response against the set of the others.

Shapes: G groups, K responses. Units: nats per group.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios
from mpo_megatron.losses.hyperparameters import Count, Hyperparameters, Positive, require
from mpo_megatron.losses.numerics import masked_logsumexp, shift_places, suffix_logsumexp
from mpo_megatron.losses.pairing import compute_preferences, find_best, find_worse_than_best
from mpo_megatron.losses.partition import compute_rank, has_distinct_rewards
from mpo_megatron.losses.registry import Needs, register
from mpo_megatron.losses.setwise import contrast_sets


def find_ranked(batch: GroupBatch, params: Any) -> Tensor:
    """[G, K] bool: the responses that have a score, in groups where not all scores are equal."""
    scores, usable = compute_preferences(batch)
    return usable & has_distinct_rewards(scores, usable).unsqueeze(-1)


def sort_by_preference(batch: GroupBatch, values: Tensor) -> tuple[Tensor, Tensor]:
    """`values` [G, K] from the best response to the worst (ties by index), and which places are filled, [G, K] bool."""
    scores, usable = compute_preferences(batch)
    order = compute_rank(scores, usable).argsort(dim=-1)
    return values.gather(-1, order), usable.gather(-1, order)


def compute_choice_terms(ordered: Tensor, filled: Tensor) -> tuple[Tensor, Tensor]:
    """Plackett–Luce: −log( e^{z_k} / Σ_{j ≥ k} e^{z_j} ) for each place k, and the places that have such a
    choice (a filled place below them), both [G, K]. Computed as −log σ(z_k − log Σ_{j > k} e^{z_j}), which
    keeps small losses' digits."""
    below = shift_places(suffix_logsumexp(ordered, filled), 0.0)
    return -F.logsigmoid(ordered - below).to(ordered.dtype), shift_places(filled, False)


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
    scores, _ = compute_preferences(batch)
    ordered, filled = sort_by_preference(batch, logits)
    ranked, _ = sort_by_preference(batch, scores)
    worse = find_next_worse(ranked, filled)
    present = worse < filled.shape[-1]
    below = suffix_logsumexp(ordered, filled).gather(-1, worse.clamp(max=filled.shape[-1] - 1))
    terms = -F.logsigmoid(ordered - below).to(ordered.dtype)
    return torch.where(present, terms, 0.0).sum(dim=-1)


def find_next_worse(scores: Tensor, filled: Tensor) -> Tensor:
    """[G, K] int64: for each place of a ranking, the first one with a strictly lower score; K if there is none.

    Args:
        scores: [G, K], from the highest to the lowest
        filled: [G, K] bool, the first places of each group
    """
    num_places = filled.shape[-1]
    place = torch.arange(num_places, device=filled.device)
    lower = filled & (scores != torch.cat((scores[..., :1], scores[..., :-1]), dim=-1))
    starts = torch.where(lower, place, num_places)
    return shift_places(starts.flip(-1).cummin(dim=-1).values.flip(-1), num_places)


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
    num_places, count = ordered.shape[-1], filled.sum(dim=-1, keepdim=True)
    num_bins = min(params.num_bins, num_places)
    bins = count.clamp(min=1, max=params.num_bins)  # of each group
    # The first place of each bin, and of one after the last: b·n / B, rounded up.
    edges = (torch.arange(num_bins + 1, device=ordered.device) * count + bins - 1) // bins
    edges = torch.minimum(edges, count)
    first, end = edges[..., :-1], edges[..., 1:]
    place = first.unsqueeze(-1) + torch.arange(math.ceil(num_places / num_bins), device=ordered.device)  # [G, B, places]
    members = ordered.gather(-1, place.clamp(max=num_places - 1).flatten(-2)).view(place.shape)
    own = masked_logsumexp(members.double(), place < end.unsqueeze(-1))
    below = suffix_logsumexp(ordered, filled).gather(-1, end.clamp(max=num_places - 1))
    terms = torch.where(end < count, -F.logsigmoid(own - below), 0.0)
    return terms.sum(dim=-1).to(ordered.dtype)

"""Listwise losses: the whole ranking of a group (Plackett–Luce), and the best response against the set of the others.

Shapes: G groups, K responses. Units: nats per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios
from mpo_megatron.losses.hyperparameters import Hyperparameters, Positive
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
    """`values` [G, K] from the best response to the worst (equals by index), and which places are filled, [G, K] bool."""
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


def find_best_and_worse(batch: GroupBatch, params: Any) -> Tensor:
    """[G, K] bool: the best response and all strictly worse ones; nothing where none is worse."""
    worse = find_worse_than_best(batch)
    return worse | (find_best(batch) & worse.any(dim=-1, keepdim=True))


@register(
    "sdpo",
    params=SdpoParams,
    scored=find_best_and_worse,
    needs=RANKING_NEEDS,
    source="S-DPO (Chen et al. 2024)",
)
def compute_sdpo(batch: GroupBatch, params: SdpoParams) -> Tensor:
    """S-DPO: −log σ( −log Σ_l e^{β (s_l − s_w)} ), w the best response, l every strictly worse one.

    Source: S-DPO (Chen et al. 2024, "On softmax direct preference optimization for recommendation").
    """
    return contrast_sets(params.beta * compute_log_ratios(batch), find_best(batch), find_worse_than_best(batch))

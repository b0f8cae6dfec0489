"""Soft Preference Optimization (SPO): losses on log π_θ itself, without a reference in the preference term.

The regulariser of the paper, β KL(π_θ ‖ π_ref) over the full vocabulary on samples from the current policy
(Eq. 15), belongs to the trainer, which adds it to this loss. This module has the in-dataset ones of Table 4. Shapes: G groups, K
responses, W winners and L losers. Units: nats / α.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios, compute_policy_logps, mask_padding
from mpo_megatron.losses.hyperparameters import NonNegative, check_unused
from mpo_megatron.losses.listwise import compute_choice_terms, find_ranked, sort_by_preference
from mpo_megatron.losses.numerics import exp_with_linear_tail, logistic_loss, masked_mean, shift_places, suffix_logsumexp
from mpo_megatron.losses.pairing import PairParams, compute_pairs, find_best, find_paired, needs_pairs
from mpo_megatron.losses.registry import Needs, register


@dataclass(frozen=True, kw_only=True)
class SpoParams(PairParams):
    """Hyper-parameters of `spo`. `pairing` and `reduction` apply only with form = pairs."""

    form: Literal["pairs", "best_of_n", "ranked"] = "pairs"
    """Preference data: pairs (Eq. 9–14), the best of the group (Eq. 16), or the whole ranking (Eq. 17)."""
    alpha: NonNegative = 0.001
    """Softness: the optimum is softmax(r / α) (App. D.1: 0.001); 0 takes the limit, Eq. 10."""
    gamma: NonNegative = 0.01
    """Exponent of the weight μ (§7); 0 gives μ = 1, SPO-basic."""
    eta: NonNegative = 1.0
    """Decay of the ranking's terms, place k (from 0) weighted η^k (App. D.1: 1 or 0.5); 0 keeps only the best's term."""
    regularizer: Literal["none", "log_prob", "token_kl", "importance"] = "none"
    """In-dataset regulariser (Table 4): −log π(y_w); or, averaged over the group's scored responses, the next token's Σ_τ
    KL(π_θ ‖ π_ref) (keeps the reference model in memory), or e^s · s."""
    regularizer_weight: NonNegative = 0.1
    """Weight of the regulariser."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.form != "pairs":
            check_unused(self, "form = pairs", "pairing", "reduction")
        if self.form != "ranked":
            check_unused(self, "form = ranked", "eta")
        if self.regularizer == "none":
            check_unused(self, "regularizer = log_prob, token_kl or importance", "regularizer_weight")


def find_soft(batch: GroupBatch, params: SpoParams) -> Tensor:
    """[G, K] bool: responses in a pair, or with a place in the ranking."""
    return find_paired(batch, params) if params.form == "pairs" else find_ranked(batch, params)


def needs_spo(params: SpoParams) -> Needs:
    """μ compares with a batch mean; only the importance-sampling regulariser needs a reference."""
    needs = needs_pairs(params) if params.form == "pairs" else Needs(preferences=True)
    return replace(
        needs,
        reference=params.regularizer == "importance",
        token_kl=params.regularizer == "token_kl",
        batch_statistics=params.gamma > 0,
    )


def compute_weights(log_mass: Tensor, present: Tensor, gamma: float, dim: int | tuple[int, ...]) -> Tensor:
    """μ = 2 σ( m^γ − mean of m^γ over the batch ), m = e^{log_mass} the responses' total probability; no gradient.

    `dim`: the dimensions that the mean runs over, where `present` is True. Source: SPO, Eq. 13.
    """
    if gamma == 0:
        return torch.ones_like(log_mass)  # without the batch, in which another group's NaN would reach all
    # In log space: m itself underflows (log-probs of −5000), m^γ does not for small γ.
    mass = torch.exp(gamma * log_mass.detach())
    return 2.0 * torch.sigmoid(mass - masked_mean(mass, present, dim=dim))


def compute_choice_losses(ordered: Tensor, filled: Tensor, alpha: float) -> tuple[Tensor, Tensor]:
    """−(1/α) log( π_k^α / Σ_{j ≥ k} π_j^α ) for each place k of the ranking and which places have it, both [G, K].

    α = 0: −(log π_k − mean_{j ≥ k} log π_j), the limit of its gradient: Eq. 10 for two responses, which the
    paper gives, and the same limit for more.
    """
    if alpha > 0:
        terms, present = compute_choice_terms(alpha * ordered, filled)
        return terms / alpha, present
    candidates = torch.where(filled, ordered.double(), 0.0)  # float64: the mean of long sums loses the digits of a difference
    total, count = (part.flip(-1).cumsum(dim=-1).flip(-1) for part in (candidates, filled))
    return (total / count.clamp(min=1) - ordered).to(ordered.dtype), shift_places(filled, False)


@register("spo", params=SpoParams, scored=find_soft, needs=needs_spo, source="SPO, Eq. 9–14, 16, 17, Table 4")
def compute_spo(batch: GroupBatch, params: SpoParams) -> Tensor:
    """SPO: −(μ/α) log( π_w^α / (π_w^α + π_l^α) ), or its best-of-n and ranked forms, with the weight μ and a regulariser.

    The weight of place k in the ranked form is μ_k η^k with k from 0, so that η = 0 is best-of-n; the paper's
    η^k with k from 1 differs by the factor η. μ_k's batch mean is taken per place, over the groups that have it.
    Source: SPO (Sharifnassab et al. 2024), Eq. 9–14 (pairs), 16 (best-of-n), 17 (ranked), Table 4 (regularisers).
    """
    logps = compute_policy_logps(batch)
    if params.form == "pairs":
        return compute_pair_form(batch, params, logps)
    ordered, filled = sort_by_preference(batch, logps)
    losses, present = compute_choice_losses(ordered, filled, params.alpha)
    present = present & find_ranked(batch, params).any(dim=-1, keepdim=True)
    log_mass = suffix_logsumexp(ordered, filled).to(ordered.dtype)
    weights = compute_weights(log_mass, present, params.gamma, dim=0)
    if params.form == "best_of_n":
        present = present & (torch.arange(present.shape[-1], device=present.device) == 0)
    else:
        place = torch.arange(present.shape[-1], device=present.device, dtype=logps.dtype)
        weights = weights * torch.pow(params.eta, place)
    losses = torch.where(present, weights * losses, 0.0).sum(dim=-1)
    if params.regularizer == "log_prob":
        best = find_best(batch)
        return losses - params.regularizer_weight * torch.where(best, logps, 0.0).sum(dim=-1)
    return losses + compute_divergence_term(batch, params)


def compute_pair_form(batch: GroupBatch, params: SpoParams, logps: Tensor) -> Tensor:
    """[G]: the pairs' loss (Eq. 11, or 12 for α = 0), averaged or summed over each group's pairs."""
    pairs = compute_pairs(batch, params)
    margins = pairs.margins(logps)
    losses = logistic_loss(params.alpha * margins) / params.alpha if params.alpha > 0 else -0.5 * margins
    log_mass = torch.logaddexp(pairs.winners(logps), pairs.losers(logps))
    # The mean of Eq. 13 runs over all pairs of all groups.
    losses = compute_weights(log_mass, pairs.mask, params.gamma, dim=(0, 1, 2)) * losses
    if params.regularizer == "log_prob":
        losses = losses - params.regularizer_weight * pairs.winners(logps)
    return pairs.reduce(losses) + compute_divergence_term(batch, params)


def compute_divergence_term(batch: GroupBatch, params: SpoParams) -> Tensor:
    """Weight · mean over the group's scored responses of the token-wise KL, or of e^s · s (Table 4), [G]; 0 with the others.

    Deviation: e^s continues along its tangent above s = 20, because e^5000 overflows.
    """
    if params.regularizer == "token_kl":
        if batch.token_kl is None:
            raise ValueError("token_kl = None; regularizer = token_kl reads it; pass token_kl [G, K].")
        terms = mask_padding(batch.token_kl, batch.valid)
    elif params.regularizer == "importance":
        log_ratios = compute_log_ratios(batch)
        terms = exp_with_linear_tail(log_ratios) * log_ratios
    else:
        return torch.zeros_like(batch.policy_logps[..., 0])
    return params.regularizer_weight * masked_mean(terms, find_soft(batch, params))

"""Losses that fit the policy's log-ratios to the distribution of rewards: InfoNCA, NCA and its pairwise form.

Shapes: G groups, K responses. Units: nats per group.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios, compute_policy_logps
from mpo_megatron.losses.hyperparameters import Hyperparameters, Positive
from mpo_megatron.losses.numerics import masked_logsumexp, masked_mean
from mpo_megatron.losses.pairing import PairParams, compute_pairs, find_best, find_paired, needs_reference_pairs
from mpo_megatron.losses.registry import Needs, register
from mpo_megatron.losses.supervised import SupervisedTermParams, compute_negative_log_likelihood


@dataclass(frozen=True, kw_only=True)
class NcaParams(Hyperparameters):
    """Hyper-parameters of `infonca` and `nca`."""

    alpha: Positive = 0.01
    """Temperature of the rewards: the target is softmax(S / α)."""
    beta: Positive = 0.01
    """Scale of the log-ratios."""


def find_several(batch: GroupBatch, params: NcaParams) -> Tensor:
    """[G, K] bool: all responses of groups that have at least two. Equal rewards count: their target is uniform."""
    return batch.valid & (batch.valid.sum(dim=-1, keepdim=True) >= 2)


def compute_reward_distribution(batch: GroupBatch, alpha: float) -> Tensor:
    """softmax(S / α) over each group's valid responses [G, K], float64 (S / α may be large); 0 at padding."""
    if batch.rewards is None:
        raise ValueError("rewards = None; the target is a softmax of rewards; pass rewards [G, K].")
    rewards = torch.where(batch.valid, batch.rewards.double(), 0.0)
    # Relative to the highest: keeps S / α from overflowing, and an all-padding row finite.
    highest = torch.where(batch.valid, rewards, -torch.inf).amax(dim=-1, keepdim=True)
    weights = torch.where(batch.valid, torch.exp((rewards - highest) / alpha), 0.0)
    return weights / weights.sum(dim=-1, keepdim=True).clamp(min=1.0)  # the highest term is 1


def compute_log_softmax(logits: Tensor, valid: Tensor) -> Tensor:
    """log softmax(z) over each group's valid responses [G, K]; finite but meaningless at padding, and for less than two.

    The highest, h, has log σ(z_h − log Σ_{j ≠ h} e^{z_j}), and i has z_i − z_h more. This keeps the digits of a log-probability
    near 0, which only the highest can have and `log_softmax` loses.
    """
    index = torch.arange(logits.shape[-1], device=logits.device)
    is_highest = index == torch.where(valid, logits, -torch.inf).argmax(dim=-1, keepdim=True)
    highest = torch.where(is_highest, logits, 0.0).sum(dim=-1, keepdim=True)
    others = masked_logsumexp(logits, valid & ~is_highest).unsqueeze(-1)
    return F.logsigmoid(highest - others) + torch.where(is_highest, 0.0, logits - highest)


@register(
    "infonca",
    params=NcaParams,
    scored=find_several,
    needs=Needs(reference=True, rewards=True),
    source="NCA, Eq. 6",
)
def compute_infonca(batch: GroupBatch, params: NcaParams) -> Tensor:
    """InfoNCA: cross-entropy −Σ_i t_i log softmax(β s)_i from the target t = softmax(S / α).

    Source: NCA (Chen et al. 2024, "Noise contrastive alignment of language models with explicit rewards"), Eq. 6.
    """
    logits = params.beta * compute_log_ratios(batch)
    target = compute_reward_distribution(batch, params.alpha).to(logits.dtype)
    return -(target * compute_log_softmax(logits, batch.valid)).sum(dim=-1)


@register(
    "nca",
    params=NcaParams,
    scored=find_several,
    needs=Needs(reference=True, rewards=True),
    source="NCA, Eq. 11",
)
def compute_nca(batch: GroupBatch, params: NcaParams) -> Tensor:
    """NCA: −Σ_i t_i log σ(β s_i) − (1/K) Σ_i log σ(−β s_i), t = softmax(S / α), K the group's own count.

    Source: NCA (Chen et al. 2024), Eq. 11.
    """
    logits = params.beta * compute_log_ratios(batch)
    target = compute_reward_distribution(batch, params.alpha).to(logits.dtype)
    return -(target * F.logsigmoid(logits)).sum(dim=-1) - masked_mean(F.logsigmoid(-logits), batch.valid)


@dataclass(frozen=True, kw_only=True)
class ReferenceFreeNcaParams(SupervisedTermParams, NcaParams):
    """Hyper-parameters of `nca_reference_free`. Without a supervised term, likelihoods collapse (nca Table 4)."""


def needs_reference_free_nca(params: ReferenceFreeNcaParams) -> Needs:
    """Rewards; lengths only for a supervised term per token."""
    return Needs(rewards=True, lengths=params.per_token)


@register(
    "nca_reference_free",
    params=ReferenceFreeNcaParams,
    scored=find_several,
    needs=needs_reference_free_nca,
    source="NCA, Table 4",
)
def compute_reference_free_nca(batch: GroupBatch, params: ReferenceFreeNcaParams) -> Tensor:
    """NCA with r = β log π in place of β log(π / π_ref), plus λ times the best response's negative log-likelihood.

    Deviation: the paper says only "SFT regularization"; here it uses the group's best response.
    Source: NCA (Chen et al. 2024), Table 4: r_θ = β log π_θ, alone and with SFT regularization.
    """
    logits = params.beta * compute_policy_logps(batch)
    target = compute_reward_distribution(batch, params.alpha).to(logits.dtype)
    losses = -(target * F.logsigmoid(logits)).sum(dim=-1) - masked_mean(F.logsigmoid(-logits), batch.valid)
    if params.sft_weight == 0:
        return losses
    supervised = compute_negative_log_likelihood(batch, params.sft_normalization)
    return losses + params.sft_weight * masked_mean(supervised, find_best(batch))


@dataclass(frozen=True, kw_only=True)
class NcaPairParams(PairParams):
    """Hyper-parameters of `nca_pair`."""

    beta: Positive = 0.01
    """Scale of the log-ratios."""


@register(
    "nca_pair",
    params=NcaPairParams,
    scored=find_paired,
    needs=needs_reference_pairs,
    source="NCA, App. B (listing); Eq. 11 with K = 2",
)
def compute_nca_pair(batch: GroupBatch, params: NcaPairParams) -> Tensor:
    """Pairwise NCA: −log σ(β s_w) − ½ log σ(−β s_w) − ½ log σ(−β s_l).

    Source: NCA (Chen et al. 2024), listing of the pairwise loss; Eq. 11 with K = 2, α → 0.
    """
    pairs = compute_pairs(batch, params)
    logits = params.beta * compute_log_ratios(batch)
    winner = -F.logsigmoid(logits) - 0.5 * F.logsigmoid(-logits)
    loser = -0.5 * F.logsigmoid(-logits)
    return pairs.reduce(pairs.winners(winner) + pairs.losers(loser))

"""GRPO on fixed responses: the offline baseline of MPO's App. I.

Shapes: G groups, K responses, T scored tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, mask_padding
from mpo_megatron.losses.hyperparameters import Hyperparameters, NonNegative, Positive, ValueRule
from mpo_megatron.losses.numerics import exp_with_linear_tail, masked_mean
from mpo_megatron.losses.partition import compute_deviations, has_distinct_rewards
from mpo_megatron.losses.registry import Needs, register

BELOW_ONE = ValueRule("be below 1, or a ratio's lower bound is ≤ 0", lambda value: value < 1)


@dataclass(frozen=True, kw_only=True)
class GrpoParams(Hyperparameters):
    """Hyper-parameters of `grpo_offline`."""

    epsilon: Annotated[Positive, BELOW_ONE] = 0.2
    """Clip range of the ratio: [1 − ε, 1 + ε]."""
    beta: NonNegative = 0.04
    """Weight of the KL penalty (DeepSeekMath §4.2); 0 for none."""


def find_advantaged(batch: GroupBatch, params: GrpoParams) -> Tensor:
    """[G, K] bool: all responses of groups whose rewards differ."""
    if batch.rewards is None:
        raise ValueError("rewards = None; advantages come from rewards; pass rewards [G, K].")
    return batch.valid & has_distinct_rewards(batch.rewards.double(), batch.valid).unsqueeze(-1)


def compute_advantages(batch: GroupBatch) -> Tensor:
    """A = (S − S̄) / std(S) [G, K] in float64; std with n − 1, as in TRL and verl, and no constant added to it."""
    deviations = compute_deviations(batch)
    count = batch.valid.sum(dim=-1, keepdim=True)
    # Scaled by the largest deviation first: the square of a huge one would overflow, of a tiny one vanish.
    largest = deviations.abs().amax(dim=-1, keepdim=True)
    scaled = deviations / torch.where(largest > 0, largest, 1.0)
    variance = (scaled**2).sum(dim=-1, keepdim=True) / (count - 1).clamp(min=1)
    return scaled / torch.where(variance > 0, variance, 1.0).sqrt()


@register(
    "grpo_offline",
    params=GrpoParams,
    scored=find_advantaged,
    needs=Needs(reference=True, rewards=True, lengths=True, tokens=True),
    source="GRPO (Shao et al. 2024), Eq. 3–4; MPO, App. I",
)
def compute_grpo_offline(batch: GroupBatch, params: GrpoParams) -> Tensor:
    """−mean over tokens of [min(ρ A, clip(ρ) A) − β (e^d − d − 1)], ρ = π_θ/π_ref per token, d = log π_ref − log π_θ.

    Mean over a response's tokens, then over the group's responses. The reference is the behaviour policy of
    the ratio as well as the anchor of the penalty (the k3 estimator of KL(π_θ ‖ π_ref)); gradients go to `token_logps`.
    Deviation: e^x continues along its tangent above x = 20, so that no token's ratio overflows.
    Source: GRPO (Shao et al. 2024, DeepSeekMath), Eq. 3–4, run offline as in MPO, App. I.
    """
    if batch.token_logps is None or batch.reference_token_logps is None or batch.lengths is None:
        raise ValueError("token_logps = None; grpo_offline works token by token; pass both token_logps and lengths.")
    position = torch.arange(batch.token_logps.shape[-1], device=batch.token_logps.device)
    scored = batch.valid.unsqueeze(-1) & (position < batch.lengths.unsqueeze(-1))
    log_ratios = mask_padding(batch.token_logps, scored) - mask_padding(batch.reference_token_logps.detach(), scored)
    advantages = compute_advantages(batch).to(log_ratios.dtype).unsqueeze(-1)
    ratios = exp_with_linear_tail(log_ratios)
    clipped = ratios.clamp(1.0 - params.epsilon, 1.0 + params.epsilon)
    penalty = exp_with_linear_tail(-log_ratios) + log_ratios - 1.0
    losses = params.beta * penalty - torch.minimum(ratios * advantages, clipped * advantages)
    return masked_mean(masked_mean(losses, scored), batch.valid)

"""The input of every loss: one batch of groups, padded to a rectangle.

Shapes: G groups, K responses per group (padded to the longest group), T scored tokens per response (padded).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class GroupBatch:
    """Log-probs (nats, summed over a response's scored tokens) and preference data of G groups.

    Entries where `valid` is False are padding: their values are never read, and may be anything, even NaN.
    """

    policy_logps: Tensor
    """[G, K] float: log π_θ(y | x), the tensor that gradients flow into."""
    valid: Tensor
    """[G, K] bool: True for responses that exist."""
    reference_logps: Tensor | None = None
    """[G, K] float: log π_ref(y | x), no gradient."""
    rewards: Tensor | None = None
    """[G, K] float: higher is better, any scale."""
    labels: Tensor | None = None
    """[G, K] int8: 1 chosen, 0 rejected, −1 neither."""
    lengths: Tensor | None = None
    """[G, K] int: number of scored tokens |y|."""
    token_logps: Tensor | None = None
    """[G, K, T] float: per-token log π_θ; token t counts where t < lengths."""
    reference_token_logps: Tensor | None = None
    """[G, K, T] float: per-token log π_ref, no gradient."""
    token_kl: Tensor | None = None
    """[G, K] float: Σ over a response's tokens of KL(π_θ ‖ π_ref) over the whole vocabulary; gradients flow into it too."""
    generator: torch.Generator | None = None
    """CPU generator for sampled pairs and negatives; in the same state on all ranks of a model replica."""


def upcast(values: Tensor) -> Tensor:
    """`values` in float32, or unchanged if float64: half precision has too few digits for sums of log-probs."""
    return values if values.dtype == torch.float64 else values.float()


LARGEST = 1e15
"""Largest log-prob in nats; its square, times any hyper-parameter, stays far below float32's limit."""


FLOAT32_MAX = torch.finfo(torch.float32).max
"""Largest magnitude of a reward: in float64, sums, differences and squares stay finite."""


def mask_padding(values: Tensor, valid: Tensor) -> Tensor:
    """`values`, upcast, within ± `LARGEST`, with 0 (and zero gradient) where `valid` is False; NaN where they are infinite.

    Beyond `LARGEST` the gradient is also zero: bf16 reaches 3e38, whose square is infinite. An infinite log-prob is a fault of
    the model or an overflow of half precision. Clamped, it would give a finite loss that moves the other responses only.
    """
    kept = torch.where(valid, upcast(values), 0.0)
    return torch.where(kept.isinf(), torch.nan, kept.clamp(-LARGEST, LARGEST))


def compute_policy_logps(batch: GroupBatch) -> Tensor:
    """log π_θ(y | x) [G, K] in nats, 0 at padding."""
    return mask_padding(batch.policy_logps, batch.valid)


def compute_log_ratios(batch: GroupBatch) -> Tensor:
    """s = log π_θ(y | x) − log π_ref(y | x) [G, K] in nats, 0 at padding; gradient through π_θ only."""
    if batch.reference_logps is None:
        raise ValueError("reference_logps = None; this loss compares with the reference policy; pass its log-probs.")
    return mask_padding(batch.policy_logps, batch.valid) - mask_padding(batch.reference_logps.detach(), batch.valid)


def compute_mean_token_logps(batch: GroupBatch) -> Tensor:
    """log π_θ(y | x) / |y| [G, K] in nats per token, 0 at padding."""
    logps = compute_policy_logps(batch)
    return logps / count_tokens(batch, logps.dtype)


def count_tokens(batch: GroupBatch, dtype: torch.dtype) -> Tensor:
    """Scored tokens |y| of each response [G, K], 1 at padding, for divisions."""
    if batch.lengths is None:
        raise ValueError("lengths = None; this loss uses the number of scored tokens; pass lengths [G, K].")
    return torch.where(batch.valid, batch.lengths, 1).to(dtype)


def draw_uniform(batch: GroupBatch) -> Tensor:
    """Uniform(0, 1) noise [G, K] in float64 from `batch.generator`, drawn on the CPU: the same on every rank and device."""
    if batch.generator is None:
        raise ValueError("generator = None; this loss draws at random; pass a seeded torch.Generator (CPU).")
    noise = torch.rand(batch.valid.shape, generator=batch.generator, dtype=torch.float64)
    return noise.to(batch.valid.device)

"""Masked reductions and stable functions shared by the losses. All values and gradients are finite."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

EXP_KNEE = 20.0
"""Log-ratio above which `exp_with_linear_tail` continues along the tangent: e^20 ≈ 5e8, far beyond any useful ratio."""


def masked_logsumexp(values: Tensor, mask: Tensor) -> Tensor:
    """log Σ e^values over the last dimension where `mask` is True.

    An empty mask gives a finite constant with zero gradient, which the callers discard, instead of −inf: the difference of two
    empty sets would be NaN.
    """
    nonempty = mask.any(dim=-1, keepdim=True)
    filled = torch.where(mask, values, -math.inf)
    return torch.logsumexp(torch.where(nonempty, filled, 0.0), dim=-1)


def suffix_logsumexp(ordered: Tensor, filled: Tensor) -> Tensor:
    """log Σ_{j ≥ k} e^{ordered_j} for each place k [G, K], float64; finite but meaningless at places that are not filled.

    float64, because the gradient divides by these sums in logarithms, whose rounding grows with their size.

    Args:
        ordered: [G, K]
        filled: [G, K] bool, the first places of each group
    """
    # A finite filler: −inf minus −inf would make the gradient NaN.
    values = torch.where(filled, ordered.double(), torch.finfo(torch.float64).min)
    return torch.logcumsumexp(values.flip(-1), dim=-1).flip(-1)


def shift_places(values: Tensor, last: float) -> Tensor:
    """`values` [G, K] of the next place, `last` at the last one."""
    return F.pad(values[..., 1:], (0, 1), value=last)


def masked_mean(values: Tensor, mask: Tensor, dim: int | tuple[int, ...] = -1) -> Tensor:
    """Mean of `values` where `mask` is True; 0 if it is True nowhere."""
    # max(count, 1): an empty set has sum 0, and 0 / 1 = 0 keeps it finite.
    return torch.where(mask, values, 0.0).sum(dim=dim) / mask.sum(dim=dim).clamp(min=1)


def logistic_loss(margins: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """−(1 − ε) log σ(m) − ε log σ(−m), elementwise, in nats; ε is the assumed share of flipped
    preferences."""
    loss = -F.logsigmoid(margins)
    if label_smoothing == 0.0:
        return loss
    return (1.0 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margins)


def log1mexp(x: Tensor) -> Tensor:
    """log(1 − e^x) for x ≤ 0, accurate at both ends (Mächler 2012).

    x = 0 (a probability that rounds to one) is replaced by the smallest negative normal number, to keep the result finite.
    """
    x = torch.where(x < 0, x, -torch.finfo(x.dtype).tiny)
    near_zero = x > -math.log(2.0)
    # Each branch gets an argument for which it is finite, so the unused branch cannot make the gradient NaN.
    small = torch.log(-torch.expm1(torch.where(near_zero, x, -1.0)))
    large = torch.log1p(-torch.exp(torch.where(near_zero, -1.0, x)))
    return torch.where(near_zero, small, large)


def exp_with_linear_tail(x: Tensor) -> Tensor:
    """e^x up to x = `EXP_KNEE`, its tangent line beyond: finite for every x, and the gradient never vanishes."""
    excess = (x - EXP_KNEE).clamp(min=0.0)
    return torch.exp(x.clamp(max=EXP_KNEE)) + math.exp(EXP_KNEE) * excess

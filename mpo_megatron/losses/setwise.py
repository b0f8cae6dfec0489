"""Set-level losses: the preferred set Y+ of a group against all of Y+ ∪ Y−.

All have the form L = −log( Σ_{Y+} e^{z} / Σ_{Y+ ∪ Y−} e^{z} ) and differ in the logits z. It is computed as softplus( log Σ_{Y−}
e^{z} − log Σ_{Y+} e^{z} ), which keeps its digits when Y+ has almost all the mass, and its gradient when it has almost none; the
papers' listings clamp probabilities at 1e-10, where the gradient is zero. Gradient: ∂L/∂z_i = p_i − p_i^+ with p the softmax over
Y+ ∪ Y−, p^+ over Y+ (mpo Lemma 6, swepo Lemma 2). Shapes: G groups, K responses. Units: nats per group.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios, compute_mean_token_logps
from mpo_megatron.losses.hyperparameters import NonNegative, Positive, check_unused
from mpo_megatron.losses.numerics import masked_logsumexp
from mpo_megatron.losses.partition import (
    PartitionParams,
    compute_deviations,
    compute_partition,
    find_partitioned,
    needs_partition,
)
from mpo_megatron.losses.registry import Needs, register


@dataclass(frozen=True, kw_only=True)
class MpoParams(PartitionParams):
    """Hyper-parameters of `mpo`."""

    beta: Positive = 0.01
    """Scale of the log-ratios; 0.01 in all the paper's tables, 0.01–0.1 useful."""


@dataclass(frozen=True, kw_only=True)
class WeightedMpoParams(PartitionParams):
    """Hyper-parameters of `wmpo`."""

    beta: Positive = 0.01
    """Scale of the log-ratios (mpo App. J: 0.01–0.05)."""
    alpha: NonNegative = 10.0
    """Scale of the reward deviations in the logits (mpo App. J); 0 gives `mpo`."""
    deviation: Literal["absolute", "signed"] = "absolute"
    """|S − S̄| as in mpo Eq. 6–8 and its listing (App. K), or S − S̄ as in its App. D (Eq. 14–16)."""


@dataclass(frozen=True, kw_only=True)
class SwepoParams(PartitionParams):
    """Hyper-parameters of `swepo`."""

    beta: Positive = 1.0
    """Scale of the log-ratios; the paper's equations have 1, its listing has β."""
    alpha: Positive = 1.0
    """Scale of the deviations: a factor with weighting = exp, a divisor of the rewards with weighting = listing."""
    p: Literal[0, 1, 2] = 1
    """Power of the deviations; 0 gives all responses equal weight."""
    weighting: Literal["exp", "power", "listing"] = "exp"
    """w = exp(α |Δ|^p), w = |Δ|^p, or what the paper's App. E code computes: logits β (s + β |Δ/α|^p)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.weighting == "power":
            check_unused(self, "weighting = exp or listing", "alpha")


@dataclass(frozen=True, kw_only=True)
class ReferenceFreeMpoParams(PartitionParams):
    """Hyper-parameters of `mpo_reference_free`."""

    beta: Positive = 2.0
    """Scale of the mean token log-probabilities (SimPO §4: 2.0–2.5)."""
    gamma: NonNegative = 1.0
    """Margin, subtracted from the logits of Y+ (SimPO §4: 0.3–1.6)."""


def contrast_sets(logits: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
    """−log( Σ_{Y+} e^z / Σ_{Y+ ∪ Y−} e^z ) [G] for logits z [G, K]; finite but meaningless where a set is empty."""
    return -F.logsigmoid(masked_logsumexp(logits, positive) - masked_logsumexp(logits, negative))


@register("mpo", params=MpoParams, scored=find_partitioned, needs=needs_partition, source="MPO, Eq. 4–5")
def compute_mpo(batch: GroupBatch, params: MpoParams) -> Tensor:
    """MPO: the preferred set against the whole group, logits β s; with one response on each side, it is DPO.

    Source: MPO (Multi-Preference Optimization), Eq. 4–5.
    """
    return contrast_sets(params.beta * compute_log_ratios(batch), *compute_partition(batch, params))


def needs_weighted(params: PartitionParams) -> Needs:
    """Rewards weight the responses even if labels split them."""
    return replace(needs_partition(params), rewards=True)


@register(
    "wmpo",
    params=WeightedMpoParams,
    scored=find_partitioned,
    needs=needs_weighted,
    source="MPO, Eq. 6–8, App. D",
)
def compute_weighted_mpo(batch: GroupBatch, params: WeightedMpoParams) -> Tensor:
    """W-MPO: MPO with logits β s + α |S − S̄| (or signed, S − S̄), S̄ the mean over all of the group's valid rewards.

    Source: MPO, Eq. 6–8 and App. K's listing (absolute); App. D, Eq. 14–16 (signed).
    """
    log_ratios = compute_log_ratios(batch)
    deviations = compute_deviations(batch)
    if params.deviation == "absolute":
        deviations = deviations.abs()
    # float64: a large deviation would swallow the log-ratio's digits in float32; the tensors are only [G, K].
    logits = params.beta * log_ratios.double() + params.alpha * deviations
    return contrast_sets(logits, *compute_partition(batch, params)).to(log_ratios.dtype)


def find_weighted(batch: GroupBatch, params: SwepoParams) -> Tensor:
    """[G, K] bool: responses in Y+ or Y− whose weight is not zero, in groups where both sets keep one."""
    positive, negative = drop_weightless(batch, params)
    return positive | negative


def drop_weightless(batch: GroupBatch, params: SwepoParams) -> tuple[Tensor, Tensor]:
    """(Y+, Y−) without responses of weight |Δ|^p = 0 (weighting = power, p > 0): log 0 = −∞ must not enter the sums."""
    positive, negative = compute_partition(batch, params)
    if params.weighting != "power" or params.p == 0:
        return positive, negative
    weighted = compute_deviations(batch) != 0
    positive, negative = positive & weighted, negative & weighted
    contrast = positive.any(dim=-1, keepdim=True) & negative.any(dim=-1, keepdim=True)
    return positive & contrast, negative & contrast


@register(
    "swepo",
    params=SwepoParams,
    scored=find_weighted,
    needs=needs_weighted,
    source="SWEPO, Eq. 5–6, 10, 15–16, App. E",
)
def compute_swepo(batch: GroupBatch, params: SwepoParams) -> Tensor:
    """SWEPO: MPO with weights w inside both sums, w = exp(α |Δ|^p) or |Δ|^p, Δ = S − S̄; p = 0 is `mpo`.

    Deviations: the paper writes β = 1; `beta` scales the log-ratios. A weight of zero (power, p > 0, S = S̄)
    removes the response from both sums. With weighting = listing, the logits are β (s + β |Δ/α|^p), as in the paper's code.
    Source: SWEPO (Simultaneous Weighted Preference Optimization), Eq. 5–6, 10, 15–16; App. E for the listing.
    """
    log_ratios = compute_log_ratios(batch)
    deviations = compute_deviations(batch).abs()
    if params.weighting == "exp":
        log_weights = params.alpha * deviations**params.p
    elif params.weighting == "listing":
        log_weights = params.beta**2 * (deviations / params.alpha) ** params.p
    else:  # power; 1 replaces zero weights, which are masked out
        log_weights = params.p * torch.log(torch.where(deviations > 0, deviations, 1.0))
    # float64 for the same reason as in `compute_weighted_mpo`.
    logits = params.beta * log_ratios.double() + log_weights
    return contrast_sets(logits, *drop_weightless(batch, params)).to(log_ratios.dtype)


def needs_reference_free(params: PartitionParams) -> Needs:
    """Lengths instead of a reference policy."""
    return replace(needs_partition(params), reference=False, lengths=True)


@register(
    "mpo_reference_free",
    params=ReferenceFreeMpoParams,
    scored=find_partitioned,
    needs=needs_reference_free,
    source="MPO, App. A.2; SimPO, Eq. 6",
)
def compute_reference_free_mpo(batch: GroupBatch, params: ReferenceFreeMpoParams) -> Tensor:
    """MPO without a reference: logits β log π(y) / |y|, minus the margin γ for Y+; with one response on each side, it is SimPO.

    Source: MPO, App. A.2, after SimPO (Meng et al. 2024), Eq. 6.
    """
    positive, negative = compute_partition(batch, params)
    logits = params.beta * compute_mean_token_logps(batch)
    return contrast_sets(logits - params.gamma * positive, positive, negative)

"""KTO and BCO: each response is good or bad by itself, against a baseline over the batch.

Y+ and Y− come from `partition`. A group's loss is the mean over its Y+ plus the mean over its Y−: for one chosen and one rejected
response, the sum of the two terms (MC-PO, Table 5). Baselines carry no gradient, and are computed over the responses in Y+ ∪ Y−
of the batch passed to `compute`. Shapes: G groups, K responses.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios
from mpo_megatron.losses.hyperparameters import NonNegative, Positive
from mpo_megatron.losses.numerics import masked_mean
from mpo_megatron.losses.partition import PartitionParams, compute_partition, find_partitioned, needs_partition
from mpo_megatron.losses.registry import Needs, register


@dataclass(frozen=True, kw_only=True)
class KtoParams(PartitionParams):
    """Hyper-parameters of `kto`."""

    beta: Positive = 0.1
    """Scale of the log-ratios."""
    desirable_weight: NonNegative = 1.0
    """λ_D: weight of Y+."""
    undesirable_weight: NonNegative = 1.0
    """λ_U: weight of Y−."""


def needs_baseline(params: PartitionParams) -> Needs:
    """A partition, a reference policy, and the whole batch."""
    return replace(needs_partition(params), batch_statistics=True)


@register(
    "kto",
    params=KtoParams,
    scored=find_partitioned,
    needs=needs_baseline,
    source="KTO (Ethayarajh et al. 2024), Eq. 7",
)
def compute_kto(batch: GroupBatch, params: KtoParams) -> Tensor:
    """λ_D (1 − σ(β (s − z))) on Y+, λ_U (1 − σ(β (z − s))) on Y−, z = max(0, mean of s over the batch); not nats.

    Deviation: z, an estimate of KL(π_θ ‖ π_ref), is the mean over the batch's own responses; the paper and
    TRL score responses paired with other prompts, which costs a forward pass each. TRL averages over single responses.
    Source: KTO (Ethayarajh et al. 2024), Eq. 7.
    """
    positive, negative = compute_partition(batch, params)
    log_ratios = compute_log_ratios(batch)
    baseline = masked_mean(log_ratios.detach(), positive | negative, dim=(0, 1)).clamp(min=0.0)
    margins = params.beta * (log_ratios - baseline)
    desirable = params.desirable_weight * masked_mean(torch.sigmoid(-margins), positive)
    return desirable + params.undesirable_weight * masked_mean(torch.sigmoid(margins), negative)


@dataclass(frozen=True, kw_only=True)
class BcoParams(PartitionParams):
    """Hyper-parameters of `bco`."""

    beta: Positive = 0.1
    """Scale of the log-ratios."""
    shift: Literal["batch", "none"] = "batch"
    """δ: half of (mean reward β s over Y+ plus that over Y−), of the batch; or 0, TRL's `bco_pair`."""


def needs_bco(params: BcoParams) -> Needs:
    """The whole batch only for the shift."""
    return replace(needs_partition(params), batch_statistics=params.shift == "batch")


@register(
    "bco",
    params=BcoParams,
    scored=find_partitioned,
    needs=needs_bco,
    source="BCO (Jung et al. 2024)",
)
def compute_bco(batch: GroupBatch, params: BcoParams) -> Tensor:
    """−log σ(β s − δ) on Y+, −log σ(−(β s − δ)) on Y−: a binary classifier with the shift δ; nats.

    Deviation: δ is the batch's, not a moving average over steps. The importance weights of the paper's second part (for data
    whose good and bad prompts differ) do not apply where both come from the same prompt. Source: BCO (Jung et al. 2024, "Binary
    classifier optimization for large language model alignment").
    """
    positive, negative = compute_partition(batch, params)
    rewards = params.beta * compute_log_ratios(batch)
    if params.shift == "batch":
        constant = rewards.detach()
        good, bad = masked_mean(constant, positive, dim=(0, 1)), masked_mean(constant, negative, dim=(0, 1))
        rewards = rewards - 0.5 * (good + bad)
    return -masked_mean(F.logsigmoid(rewards), positive) - masked_mean(F.logsigmoid(-rewards), negative)

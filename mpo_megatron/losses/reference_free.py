"""Pairwise losses without a reference policy: SimPO, CPO, ORPO, SLiC-HF, on the pairs that `pairing` selects from a group.

w is the pair's winner, l its loser; each function returns the mean (or sum) over the group's pairs. Units: nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios, compute_mean_token_logps, compute_policy_logps
from mpo_megatron.losses.hyperparameters import NonNegative, Positive, check_unused
from mpo_megatron.losses.numerics import log1mexp, logistic_loss
from mpo_megatron.losses.pairing import PairParams, compute_pairs, find_paired, needs_pairs
from mpo_megatron.losses.registry import Needs, register
from mpo_megatron.losses.supervised import SupervisedPairParams, add_supervised, compute_negative_log_likelihood, needs_supervised


def needs_lengths(params: PairParams) -> Needs:
    """Lengths are always needed."""
    return replace(needs_pairs(params), lengths=True)


@dataclass(frozen=True, kw_only=True)
class SimpoParams(SupervisedPairParams):
    """Hyper-parameters of `simpo`."""

    beta: Positive = 2.0
    """Scale of the mean token log-probabilities (SimPO §4: 2.0–2.5)."""
    gamma: NonNegative = 1.0
    """Target margin (SimPO §4: 0.3–1.6). TRL's `simpo_gamma` is the same number."""


@register(
    "simpo",
    params=SimpoParams,
    scored=find_paired,
    needs=needs_lengths,
    source="SimPO (Meng et al. 2024), Eq. 6",
)
def compute_simpo(batch: GroupBatch, params: SimpoParams) -> Tensor:
    """−log σ( β log π(y_w)/|y_w| − β log π(y_l)/|y_l| − γ ); with sft_weight > 0 it is CPO-SimPO.

    Source: SimPO (Meng et al. 2024), Eq. 6; CPO-SimPO: MC-PO, Table 5 (its "CPO").
    """
    pairs = compute_pairs(batch, params)
    margins = pairs.margins(params.beta * compute_mean_token_logps(batch)) - params.gamma
    losses = logistic_loss(margins, params.label_smoothing)
    return pairs.reduce(add_supervised(batch, pairs, losses, params))


@dataclass(frozen=True, kw_only=True)
class CpoParams(SupervisedPairParams):
    """Hyper-parameters of `cpo`."""

    beta: Positive = 0.1
    """Scale of the log-probabilities."""
    sft_weight: NonNegative = 1.0
    """Weight of the winner's negative log-likelihood (the paper's loss has 1)."""


@register(
    "cpo",
    params=CpoParams,
    scored=find_paired,
    needs=needs_supervised,
    source="CPO (Xu et al. 2024), Eq. 3",
)
def compute_cpo(batch: GroupBatch, params: CpoParams) -> Tensor:
    """−log σ( β log π(y_w) − β log π(y_l) ) − weight · log π(y_w), the second term per token by default.

    Source: CPO (Xu et al. 2024), Eq. 3, the supervised term as in TRL's `cpo_alpha`.
    """
    pairs = compute_pairs(batch, params)
    losses = logistic_loss(pairs.margins(params.beta * compute_policy_logps(batch)), params.label_smoothing)
    return pairs.reduce(add_supervised(batch, pairs, losses, params))


@dataclass(frozen=True, kw_only=True)
class OrpoParams(PairParams):
    """Hyper-parameters of `orpo`."""

    beta: Positive = 0.1
    """λ of the paper: weight of the odds-ratio term beside the winner's negative log-likelihood."""


@register(
    "orpo",
    params=OrpoParams,
    scored=find_paired,
    needs=needs_lengths,
    source="ORPO (Hong et al. 2024), Eq. 4, 7",
)
def compute_orpo(batch: GroupBatch, params: OrpoParams) -> Tensor:
    """−log p_w − λ log σ( log odds(y_w) − log odds(y_l) ), odds = p / (1 − p), p = π(y)^{1/|y|}; nats per token.

    Source: ORPO (Hong et al. 2024), Eq. 4, 7.
    """
    pairs = compute_pairs(batch, params)
    mean_logps = compute_mean_token_logps(batch)
    losses = params.beta * logistic_loss(pairs.margins(mean_logps - log1mexp(mean_logps)))
    return pairs.reduce(losses + pairs.winners(compute_negative_log_likelihood(batch, "token")))


@dataclass(frozen=True, kw_only=True)
class SlicParams(SupervisedPairParams):
    """Hyper-parameters of `slic`. No label smoothing: the hinge is no likelihood."""

    beta: Positive = 1.0
    """Scale of the log-probabilities (or log-ratios) before the hinge."""
    margin: Positive = 1.0
    """δ: desired margin, in nats."""
    normalized: bool = False
    """Compare log-ratios to the reference instead of log-probabilities: RSO's "hinge-norm", TRL's `hinge`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_unused(self, "a logistic loss", "label_smoothing")


def needs_slic(params: SlicParams) -> Needs:
    """A reference only for the normalised form."""
    return replace(needs_supervised(params), reference=params.normalized)


@register(
    "slic",
    params=SlicParams,
    scored=find_paired,
    needs=needs_slic,
    source="SLiC-HF (Zhao et al. 2023); RSO (Liu et al. 2023)",
)
def compute_slic(batch: GroupBatch, params: SlicParams) -> Tensor:
    """max(0, δ − β (log π(y_w) − log π(y_l))), optionally of log-ratios, plus a supervised term on the winner.

    Deviation: the paper's supervised target is the reference answer of the supervised data; here it is the winner.
    Source: SLiC-HF (Zhao et al. 2023); the normalised form: RSO (Liu et al. 2023), as in TRL's `hinge`.
    """
    pairs = compute_pairs(batch, params)
    scores = compute_log_ratios(batch) if params.normalized else compute_policy_logps(batch)
    losses = torch.relu(params.margin - params.beta * pairs.margins(scores))
    return pairs.reduce(add_supervised(batch, pairs, losses, params))

"""Pairwise losses with a reference policy: DPO and its relatives, on the pairs that `pairing` selects from a group.

s = log π_θ(y) − log π_ref(y); w is the pair's winner, l its loser. Each function returns the mean (or sum)
over the group's pairs. Units: nats, unless a docstring says otherwise. Shapes: G groups, W winners and L losers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios, count_tokens
from mpo_megatron.losses.hyperparameters import BELOW_HALF, NonNegative, Positive, Smoothing
from mpo_megatron.losses.numerics import logistic_loss
from mpo_megatron.losses.pairing import PairParams, compute_pairs, find_paired, needs_reference_pairs
from mpo_megatron.losses.registry import Needs, register
from mpo_megatron.losses.supervised import SupervisedPairParams, add_supervised, needs_supervised


@dataclass(frozen=True, kw_only=True)
class DpoParams(SupervisedPairParams):
    """Hyper-parameters of `dpo`. Label smoothing makes it conservative DPO."""

    beta: Positive = 0.1
    """Scale of the log-ratios."""


def needs_dpo(params: DpoParams) -> Needs:
    """A reference policy; lengths only for a supervised term per token."""
    return replace(needs_supervised(params), reference=True)


@register("dpo", params=DpoParams, scored=find_paired, needs=needs_dpo, source="DPO (Rafailov et al. 2023), Eq. 7")
def compute_dpo(batch: GroupBatch, params: DpoParams) -> Tensor:
    """−log σ(β (s_w − s_l)), with label smoothing ε: −(1 − ε) log σ(m) − ε log σ(−m); optional supervised term.

    Source: DPO (Rafailov et al. 2023), Eq. 7; smoothing: Mitchell 2023, "A note on DPO with noisy preferences".
    """
    pairs = compute_pairs(batch, params)
    losses = logistic_loss(pairs.margins(params.beta * compute_log_ratios(batch)), params.label_smoothing)
    return pairs.reduce(add_supervised(batch, pairs, losses, params))


@dataclass(frozen=True, kw_only=True)
class RpoParams(DpoParams):
    """Hyper-parameters of `rpo`: DPO's, with the supervised term on."""

    beta: Positive = 0.01
    """Scale of the log-ratios (mc-po App. B.2)."""
    sft_weight: NonNegative = 0.1
    """λ of the supervised term (mc-po App. B.2)."""


@register(
    "rpo",
    params=RpoParams,
    scored=find_paired,
    needs=needs_dpo,
    source="RPO (Liu et al. 2024); MC-PO, Table 5",
)
def compute_rpo(batch: GroupBatch, params: RpoParams) -> Tensor:
    """DPO plus λ times the winner's negative log-likelihood.

    Deviation: MC-PO's Table 5 writes the term as −λ s_w; its gradient is the one of sft_normalization =
    sequence. The default is the mean per token, which TRL (the basis of both papers) computes.
    Source: RPO (Liu et al. 2024, "Provably mitigating overoptimization in RLHF"); MC-PO, Table 5.
    """
    return compute_dpo(batch, params)


@dataclass(frozen=True, kw_only=True)
class DpoPositiveParams(PairParams):
    """Hyper-parameters of `dpo_positive`."""

    beta: Positive = 0.3
    """Scale of the log-ratios (the paper's MetaMath runs)."""
    penalty: NonNegative = 50.0
    """λ: weight of the winner's fall below the reference; 0 gives `dpo`."""


@register(
    "dpo_positive",
    params=DpoPositiveParams,
    scored=find_paired,
    needs=needs_reference_pairs,
    source="DPO-Positive (Pal et al. 2024), Eq. 3",
)
def compute_dpo_positive(batch: GroupBatch, params: DpoPositiveParams) -> Tensor:
    """−log σ(β (s_w − s_l − λ max(0, −s_w))): DPO with a penalty if the winner becomes less likely than under the reference.

    Source: DPO-Positive (Pal et al. 2024, "Smaug: fixing failure modes of preference optimisation with DPO-Positive"), Eq. 3.
    """
    pairs = compute_pairs(batch, params)
    log_ratios = compute_log_ratios(batch)
    fallen = pairs.winners(torch.relu(-log_ratios))
    return pairs.reduce(logistic_loss(params.beta * (pairs.margins(log_ratios) - params.penalty * fallen)))


@dataclass(frozen=True, kw_only=True)
class IpoParams(PairParams):
    """Hyper-parameters of `ipo`."""

    beta: Positive = 0.1
    """τ of the paper: the target margin is 1 / (2β)."""
    reading: Literal["length_normalized", "summed"] = "length_normalized"
    """s per token, as in TRL and LLaMA-Factory (confirmed by the authors as the form of their results), or
    summed over the response, as the paper writes and NeMo-Aligner and OpenRLHF compute."""


def needs_ipo(params: IpoParams) -> Needs:
    """Lengths only for the length-normalised reading."""
    return replace(needs_reference_pairs(params), lengths=params.reading == "length_normalized")


@register("ipo", params=IpoParams, scored=find_paired, needs=needs_ipo, source="IPO (Azar et al. 2023), Eq. 17")
def compute_ipo(batch: GroupBatch, params: IpoParams) -> Tensor:
    """(s_w − s_l − 1/(2β))², s summed or divided by |y|; nats squared.

    Source: IPO (Azar et al. 2023), Eq. 17.
    """
    pairs = compute_pairs(batch, params)
    log_ratios = compute_log_ratios(batch)
    if params.reading == "length_normalized":
        log_ratios = log_ratios / count_tokens(batch, log_ratios.dtype)
    return pairs.reduce((pairs.margins(log_ratios) - 1.0 / (2.0 * params.beta)) ** 2)


@dataclass(frozen=True, kw_only=True)
class ExoParams(PairParams):
    """Hyper-parameters of `exo`."""

    beta: Positive = 0.1
    """Scale of the log-ratios."""
    label_smoothing: Annotated[Positive, BELOW_HALF] = 1e-3
    """ε: the target puts 1 − ε on the winner; must be positive, or the divergence is infinite."""


@register(
    "exo",
    params=ExoParams,
    scored=find_paired,
    needs=needs_reference_pairs,
    source="EXO (Ji et al. 2024), Eq. 16",
)
def compute_exo(batch: GroupBatch, params: ExoParams) -> Tensor:
    """KL( softmax(β s) ‖ (1 − ε, ε) ) over winner and loser: the reverse divergence, mode-seeking.

    Source: EXO (Ji et al. 2024), Eq. 16 (EXO-pref), as in TRL's `exo_pair`.
    """
    pairs = compute_pairs(batch, params)
    margins = pairs.margins(params.beta * compute_log_ratios(batch))
    winner = torch.sigmoid(margins) * (F.logsigmoid(margins) - math.log1p(-params.label_smoothing))
    loser = torch.sigmoid(-margins) * (F.logsigmoid(-margins) - math.log(params.label_smoothing))
    return pairs.reduce(winner + loser)


@dataclass(frozen=True, kw_only=True)
class RdpoParams(PairParams):
    """Hyper-parameters of `rdpo`."""

    beta: Positive = 0.1
    """Scale of the log-ratios."""
    alpha: NonNegative = 0.01
    """Weight of the length difference, per token."""
    label_smoothing: Smoothing = 0.0
    """As in `dpo`."""


def needs_rdpo(params: RdpoParams) -> Needs:
    """Lengths and a reference policy."""
    return replace(needs_reference_pairs(params), lengths=True)


@register("rdpo", params=RdpoParams, scored=find_paired, needs=needs_rdpo, source="R-DPO (Park et al. 2024)")
def compute_rdpo(batch: GroupBatch, params: RdpoParams) -> Tensor:
    """−log σ(β (s_w − s_l) + α (|y_w| − |y_l|)): a longer winner needs a smaller margin, which reduces length bias.

    The sign follows from the penalised reward r − α|y| that the paper optimises (SimPO's table prints the opposite one).
    Source: R-DPO (Park et al. 2024, "Disentangling length from quality in DPO").
    """
    pairs = compute_pairs(batch, params)
    log_ratios = compute_log_ratios(batch)
    rewards = params.beta * log_ratios + params.alpha * count_tokens(batch, log_ratios.dtype)
    return pairs.reduce(logistic_loss(pairs.margins(rewards), params.label_smoothing))


@dataclass(frozen=True, kw_only=True)
class ApoZeroParams(PairParams):
    """Hyper-parameters of `apo_zero`."""

    beta: Positive = 0.1
    """Scale of the log-ratios."""


@register(
    "apo_zero",
    params=ApoZeroParams,
    scored=find_paired,
    needs=needs_reference_pairs,
    source="APO (D'Oosterlinck et al. 2024), Eq. 7",
)
def compute_apo_zero(batch: GroupBatch, params: ApoZeroParams) -> Tensor:
    """1 − σ(β s_w) + σ(β s_l): raises the winner and lowers the loser, independently; a probability, not nats.

    Source: APO (D'Oosterlinck et al. 2024), Eq. 7, as in TRL's `apo_zero`.
    """
    pairs = compute_pairs(batch, params)
    rewards = params.beta * compute_log_ratios(batch)
    return pairs.reduce(pairs.winners(torch.sigmoid(-rewards)) + pairs.losers(torch.sigmoid(rewards)))


@dataclass(frozen=True, kw_only=True)
class SppoParams(PairParams):
    """Hyper-parameters of `sppo`."""

    beta: Positive = 0.001
    """1/η of the paper (η = 1e3): the targets are ± 1/(2β)."""


@register(
    "sppo",
    params=SppoParams,
    scored=find_paired,
    needs=needs_reference_pairs,
    source="SPPO (Wu et al. 2024), Eq. 4.7",
)
def compute_sppo(batch: GroupBatch, params: SppoParams) -> Tensor:
    """(s_w − 1/(2β))² + (s_l + 1/(2β))²; nats squared.

    Deviation: hard preferences (P = 1 for the winner, 0 for the loser), as in TRL's `sppo_hard`; the paper
    estimates P with a preference model.
    Source: SPPO (Wu et al. 2024), Eq. 4.7.
    """
    pairs = compute_pairs(batch, params)
    log_ratios = compute_log_ratios(batch)
    target = 1.0 / (2.0 * params.beta)
    return pairs.reduce(pairs.winners((log_ratios - target) ** 2) + pairs.losers((log_ratios + target) ** 2))

"""The supervised term, alone (`sft`) and as an addition to preference losses. Units: nats."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_mean_token_logps, compute_policy_logps
from mpo_megatron.losses.hyperparameters import Hyperparameters, NonNegative, Smoothing, check_unused
from mpo_megatron.losses.numerics import masked_mean
from mpo_megatron.losses.pairing import PairParams, Pairs, find_best, needs_pairs
from mpo_megatron.losses.partition import PartitionParams, compute_partition
from mpo_megatron.losses.registry import Needs, register

LogpNormalization = Literal["token", "sequence"]


@dataclass(frozen=True, kw_only=True)
class SftParams(PartitionParams):
    """Hyper-parameters of `sft`. `partition` applies only with targets = positives."""

    targets: Literal["best", "positives"] = "best"
    """What to imitate: the group's best response, or all of Y+ equally."""
    normalization: LogpNormalization = "token"
    """−log π(y) divided by |y| (nats per token), or not (nats per response)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets != "positives":
            check_unused(self, "targets = positives", "partition")


def compute_negative_log_likelihood(batch: GroupBatch, normalization: str) -> Tensor:
    """−log π_θ(y | x) [G, K], per token or per sequence; 0 at padding."""
    if normalization == "token":
        return -compute_mean_token_logps(batch)
    return -compute_policy_logps(batch)


def find_target(batch: GroupBatch, params: SftParams) -> Tensor:
    """[G, K] bool: Y+, or the group's best response (the first valid one if there are neither rewards nor labels)."""
    if params.targets == "positives":
        return compute_partition(batch, params)[0]
    if batch.rewards is None and batch.labels is None:
        return batch.valid & (batch.valid.cumsum(dim=-1) == 1)
    best = find_best(batch)
    # With labels only, a group may have no chosen response: a rejected one must not be a target.
    return best if batch.rewards is not None else best & (batch.labels == 1)


def needs_sft(params: SftParams) -> Needs:
    """The best response may be the only one; Y+ needs worse ones beside it; lengths only for the mean per token."""
    lengths = params.normalization == "token"
    if params.targets == "best":
        return Needs(lengths=lengths, contrast=False)
    by_label = params.partition == "labels"
    return Needs(lengths=lengths, rewards=not by_label, labels=by_label)


@register(
    "sft",
    params=SftParams,
    scored=find_target,
    needs=needs_sft,
    source="maximum likelihood; MPO, App. J (first stage)",
)
def compute_sft(batch: GroupBatch, params: SftParams) -> Tensor:
    """Negative log-likelihood of each group's best response, or mean over its Y+; per token or per sequence.

    Deviation from the usual language-model loss with normalization = token: the mean is over a response's
    tokens first, then over groups, so long and short responses have equal weight.
    """
    return masked_mean(compute_negative_log_likelihood(batch, params.normalization), find_target(batch, params))


@dataclass(frozen=True, kw_only=True)
class SupervisedTermParams(Hyperparameters):
    """Hyper-parameters of an optional supervised term."""

    sft_weight: NonNegative = 0.0
    """Weight of the negative log-likelihood of the winner (or best response), added to the loss."""
    sft_normalization: LogpNormalization = "token"
    """Unit of that likelihood: per token (nats per token) or per sequence."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sft_weight == 0:
            check_unused(self, "sft_weight > 0", "sft_normalization")

    @property
    def per_token(self) -> bool:
        """Whether there is a supervised term per token, for which lengths are needed."""
        return self.sft_weight > 0 and self.sft_normalization == "token"


@dataclass(frozen=True, kw_only=True)
class SupervisedPairParams(SupervisedTermParams, PairParams):
    """Hyper-parameters of pairwise losses with an optional supervised term."""

    label_smoothing: Smoothing = 0.0
    """Assumed share of flipped preferences, in [0, 0.5)."""


def needs_supervised(params: SupervisedPairParams) -> Needs:
    """Lengths only for a supervised term per token."""
    return replace(needs_pairs(params), lengths=params.per_token)


def add_supervised(batch: GroupBatch, pairs: Pairs, losses: Tensor, params: SupervisedTermParams) -> Tensor:
    """[G, W, L] pair losses + sft_weight · NLL of the winner."""
    if params.sft_weight == 0:
        return losses
    return losses + params.sft_weight * pairs.winners(compute_negative_log_likelihood(batch, params.sft_normalization))

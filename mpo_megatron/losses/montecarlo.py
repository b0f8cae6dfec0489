"""MC-PO and RNCE: the best response against M negatives, chosen from the group by sampling.

Shapes: G groups, K responses (the best one, y_0, and up to K − 1 candidates). Units: nats per group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mpo_megatron.losses.batch import GroupBatch, compute_log_ratios, draw_uniform
from mpo_megatron.losses.hyperparameters import Count, Hyperparameters, Positive, check_unused
from mpo_megatron.losses.listwise import find_best_and_worse
from mpo_megatron.losses.pairing import find_best, find_worse_than_best
from mpo_megatron.losses.partition import compute_rank
from mpo_megatron.losses.registry import Needs, register
from mpo_megatron.losses.setwise import contrast_sets


@dataclass(frozen=True, kw_only=True)
class McpoParams(Hyperparameters):
    """Hyper-parameters of `mcpo`."""

    beta: Positive = 0.01
    """Scale of the log-ratios, in the loss and in the kernel (mc-po App. B.2)."""
    num_negatives: Count = 1
    """M: negatives per group, drawn without replacement; a group with fewer candidates uses all of them."""
    sampling: Literal["kernel", "random", "max", "min"] = "kernel"
    """Draw candidates with probability ∝ e^{β s} under the current policy (Algorithm 1) | uniformly (RNCE); or take those of
    highest | lowest weight, without sampling (mc-po §5)."""
    chain_steps: Count = 1
    """Steps of the kernel. With a group's fixed candidates, one step already draws from the kernel's stationary distribution:
    more steps draw other negatives with the same probabilities."""
    include_current: bool = False
    """Keep the chain's start y_0 among the categories at every step, as in Algorithm 1: y_0 may be its own negative."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sampling != "kernel":
            check_unused(self, "sampling = kernel", "chain_steps", "include_current")


@dataclass(frozen=True, kw_only=True)
class RnceParams(Hyperparameters):
    """Hyper-parameters of `rnce`."""

    beta: Positive = 0.01
    """Scale of the log-ratios."""
    num_negatives: Count = 1
    """M: negatives per group, drawn uniformly without replacement."""


def draw_negatives(batch: GroupBatch, params: McpoParams, logits: Tensor) -> Tensor:
    """[G, K] bool: the M negatives of each group for logits β s [G, K]. No gradient.

    Sampling without replacement from softmax(logits) is taking the M largest of logits + Gumbel noise.
    """
    best, candidates = find_best(batch), find_worse_than_best(batch)
    weights = logits.detach().double()
    if params.sampling == "max":
        return candidates & (compute_rank(weights, candidates) < params.num_negatives)
    if params.sampling == "min":
        return candidates & (compute_rank(-weights, candidates) < params.num_negatives)
    if params.sampling == "random":
        return candidates & (compute_rank(draw_uniform(batch), candidates) < params.num_negatives)
    # A step from any state draws from softmax(β s) over the same pool, so that is the stationary distribution, reached in one
    # step. A pool that drops y_0 once the chain has left it would be a different one.
    pool = candidates | best if params.include_current else candidates
    drawn = candidates
    for _ in range(params.chain_steps):
        keys = weights - torch.log(-torch.log1p(-draw_uniform(batch)))
        drawn = pool & (compute_rank(keys, pool) < params.num_negatives)
    return drawn


def needs_mcpo(params: McpoParams) -> Needs:
    """A generator only if something is drawn."""
    return Needs(reference=True, preferences=True, sampled=params.sampling in ("kernel", "random"))


@register(
    "mcpo",
    params=McpoParams,
    scored=find_best_and_worse,
    needs=needs_mcpo,
    source="MC-PO, Eq. 7, Table 5, Algorithm 1",
)
def compute_mcpo(batch: GroupBatch, params: McpoParams) -> Tensor:
    """MC-PO: −β s_0 + log Σ_{i=0..M} e^{β s_i}, y_0 the best response, y_1..y_M negatives drawn by the kernel; M = 1 is DPO.

    The gradient reaches y_0 and the drawn negatives. It is exactly zero for all others, so they need no backward pass.
    Deviation: candidates are the group's strictly worse responses, fixed over the chain's steps (Algorithm 1
    proposes new ones at each). With include_current, a drawn y_0 counts twice in the sum.
    Source: MC-PO, Algorithm 1, Eq. 7, Table 5.
    """
    logits = params.beta * compute_log_ratios(batch)
    return contrast_sets(logits, find_best(batch), draw_negatives(batch, params, logits))


@register(
    "rnce",
    params=RnceParams,
    scored=find_best_and_worse,
    needs=Needs(reference=True, preferences=True, sampled=True),
    source="MC-PO, Eq. 7, Proposition 2.1",
)
def compute_rnce(batch: GroupBatch, params: RnceParams) -> Tensor:
    """RNCE: MC-PO with negatives drawn uniformly.

    Source: MC-PO, Proposition 2.1, Eq. 7 (ranking noise-contrastive estimation, Olmin et al. 2024).
    """
    uniform = McpoParams(beta=params.beta, num_negatives=params.num_negatives, sampling="random")
    return compute_mcpo(batch, uniform)

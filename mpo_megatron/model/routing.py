"""Routers of packed rows: forced expert choices, loads, the load-balancing loss and the z-loss, token by token.

Megatron-Core's router sees only one micro-batch: its auxiliary losses average over micro-batches, so they change with the
packing, and its RouterReplay keeps one queue of choices for all models of a process. Here each row carries its routers' inputs
(`RowRouting`) in its layout, which recomputation and pipelines pass to every layer. Choices are forced through Megatron-Core's
`precomputed_indices`, and loss terms are attached through its MoEAuxLossAutoScaler. Its scale is 1: losses are scaled before
backward, and gradients are summed over rows and ranks (see train/step.py).

Legend: T tokens of the row on this rank, E experts of a layer, k experts of a token, U units over whose tokens loads are
balanced, L layers with experts. A layer's place is its index among these, from 0.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    compute_routing_scores_for_aux_loss,
    topk_routing_with_score_function,
    z_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor
from torch.distributed import all_reduce

from mpo_megatron import device
from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.packing import Row
from mpo_megatron.families import Family
from mpo_megatron.model.parallel import Ranks


@dataclass(frozen=True, kw_only=True)
class Terms:
    """Terms that routers add to the loss."""

    balance_coeff: float
    z_coeff: float
    unit_weight: Tensor
    """[U] float32: 1 / (W² · number of units), W the unit's counted tokens; 0 for a unit without tokens."""
    num_tokens: int
    """Counted tokens of the step, over all ranks."""
    loads: Tensor | None = None
    """[L, U, E] tokens sent to each expert, over all ranks; None: each unit is in one row, whose ranks sum their loads."""


@dataclass(kw_only=True)
class Found:
    """Results of a layer's router on this rank; overwritten, not added to, when the layer is recomputed."""

    balance: Tensor | None = None
    """This rank's part of the load-balancing loss, without its coefficient."""
    z: Tensor | None = None
    """This rank's part of the z-loss, without its coefficient."""
    agreed: Tensor | None = None
    """Number of choices of counted tokens that agree with the reference's."""
    loads: Tensor | None = None
    """[U, E] counted tokens by expert, float32."""
    choices: Tensor | None = None
    """[T, k] chosen experts of each token, ascending; uint8, or int32 with more than 256 experts."""


@dataclass(kw_only=True)
class RowRouting:
    """Router inputs for a row and a pass, for this rank's tokens of the row."""

    units: Tensor
    """[T] unit over which each token is balanced; 0 where it does not count."""
    counted: Tensor
    """[T] False for padding and for repeated copies of a prompt."""
    real: Tensor
    """[T] False for padding."""
    reference: Mapping[int, Tensor] | None = None
    """[T, k] the reference's choices by layer's place; arbitrary for padding."""
    replay: bool = False
    """Whether to route the tokens by `reference`."""
    terms: Terms | None = None
    count: int = 0
    """U, to count loads; 0: do not count."""
    record: bool = False
    """Whether to keep the choices."""
    found: dict[int, Found] = field(default_factory=dict)
    """Results of each router, by place."""


def own_tokens(num_tokens: int, ranks: Ranks) -> Int64:
    """[T] the tokens of a row that this rank's routers see: every context-th one, of which sequence parallelism takes a range."""
    tokens = np.arange(num_tokens)[ranks.context.rank() :: ranks.context.size()]
    share = len(tokens) // ranks.tensor.size()
    return tokens[ranks.tensor.rank() * share :][:share]


def row_routing(row: Row, ranks: Ranks, *, by_group: bool = True, **options: Any) -> RowRouting:
    """A row's routing on this rank.

    Args:
        by_group: a unit is a group, numbered by its slot; otherwise the whole row is one unit
        options: other fields
    """
    own = own_tokens(len(row.tokens), ranks)
    slots, counted = row.slots[own], row.counted[own]
    units = np.where(counted, slots, 0) if by_group else np.zeros_like(slots)
    parts = device.upload(np.stack((units, counted, slots >= 0)))
    return RowRouting(units=parts[0], counted=parts[1].bool(), real=parts[2].bool(), **options)


class RowRouter(TopKRouter):
    """Megatron-Core's router, extended by the current row's `RowRouting`."""

    def __init__(self, *, place: int, **options: Any) -> None:
        super().__init__(**options)
        self.place = place
        self.row: RowRouting | None = None

    def routing(self, logits: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, E] weights and choices of experts.

        Args:
            logits: [T, 1, E]
        """
        if self.row is None:
            result: tuple[Tensor, Tensor] = super().routing(logits, padding_mask)
            return result
        row, shape = self.row, logits.shape
        learns = row.terms if self.training and torch.is_grad_enabled() else None
        found = row.found[self.place] = Found()
        logits = logits.view(-1, shape[-1])
        if learns is not None and learns.z_coeff > 0:
            logits = self._add_z(logits, row, learns, found)
        reference = None if row.reference is None else row.reference[self.place].long()
        if reference is not None and row.replay:
            chosen, _ = compute_routing_scores_for_aux_loss(logits.detach(), self.topk, self.score_function)
            probs, routes = self._forced(logits, torch.where(row.real[:, None], reference, experts_of(chosen, self.topk)))
        else:
            probs, routes = super().routing(logits.view(shape))
            chosen = routes
        if reference is not None:
            found.agreed = (chosen.gather(1, reference) & row.counted[:, None]).sum()
        if row.record:
            small = torch.uint8 if shape[-1] <= 256 else torch.int32
            found.choices = experts_of(routes, self.topk).sort(dim=1).values.to(small)
        balanced = learns is not None and learns.balance_coeff > 0
        if row.count and (not balanced or learns is None or learns.loads is None):
            counts = (chosen & row.counted[:, None]).float()
            found.loads = counts.new_zeros(row.count, shape[-1]).index_add_(0, row.units, counts)
        if learns is not None and balanced:
            probs = self._add_balance(probs, logits, row, learns, found)
        return probs, routes

    def _forced(self, logits: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
        """Weights of given experts [T, k]; the fused kernel, which would choose experts, is not used."""
        result: tuple[Tensor, Tensor] = topk_routing_with_score_function(
            logits,
            self.topk,
            use_pre_softmax=self.config.moe_router_pre_softmax,
            scaling_factor=self.config.moe_router_topk_scaling_factor,
            score_function=self.score_function,
            precomputed_indices=indices,
        )
        return result

    def _add_z(self, logits: Tensor, row: RowRouting, terms: Terms, found: Found) -> Tensor:
        """Attach Σ over counted tokens of (log Σ exp logits)² / W, W those of the whole step (ST-MoE, Eq. 5)."""
        mean = z_loss_func(logits, 1.0, padding_mask=~row.counted)
        z = mean * (row.counted.sum() / terms.num_tokens)  # the mean over this rank's part of the row, weighted by its share
        found.z = z.detach()
        attached: Tensor = MoEAuxLossAutoScaler.apply(logits, terms.z_coeff * z)
        return attached

    def _add_balance(self, probs: Tensor, logits: Tensor, row: RowRouting, terms: Terms, found: Found) -> Tensor:
        """Attach E · Σ_e f_e · P_e (Switch Transformer, Eq. 4–6, f divided by k), the mean over units.

        f_e = loads_e / (k W) is constant, P_e = Σ_t p_te / W. This is `switch_load_balancing_loss_func` for several units at
        once. The router's own choices count, even if the reference's are replayed.
        """
        if terms.loads is None:
            assert found.loads is not None
            loads = found.loads.clone()
            if self.tp_cp_group.size() > 1:  # forward: sum over the ranks that share the row; no gradient
                all_reduce(loads, group=self.tp_cp_group)
        else:
            loads = terms.loads[self.place]
        factor = logits.shape[-1] / self.topk
        density = loads * (factor * terms.unit_weight[:, None])
        scores = torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
        balance = (scores * (density[row.units] * row.counted[:, None])).sum()
        found.balance = balance.detach()
        attached: Tensor = MoEAuxLossAutoScaler.apply(probs, terms.balance_coeff * balance)
        return attached


def experts_of(routes: Tensor, topk: int) -> Tensor:
    """[T, k] the experts of each token, from a map [T, E] with k of them per token; on the device, without synchronization."""
    return routes.to(torch.uint8).topk(topk, dim=1).indices


class RowExperts(MoELayer):
    """Megatron-Core's layer of experts whose router receives the row's routing, the same one at recomputation.

    Recomputation may run while other rows are in progress, so this layer binds the row itself.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.again = self.config.recompute_granularity == "selective" and "moe" in self.config.recompute_modules
        self.moe_layer_recompute = False
        self.row: RowRouting | None = None

    def forward(self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: None = None) -> Any:
        """[T, 1, H] → ([T, 1, H], None)."""
        row = self.row

        def run(hidden: Tensor) -> Any:
            self.router.row = row
            try:
                return super(RowExperts, self).forward(hidden)
            finally:
                self.router.row = None

        if self.again and self.training:
            return tensor_parallel.checkpoint(run, False, hidden_states)
        return run(hidden_states)


class RowLayer(TransformerLayer):
    """Megatron-Core's layer that passes the row's routing to its experts."""

    def _forward_mlp(
        self, hidden_states: Tensor, inference_context: Any = None, padding_mask: None = None, packed_seq_params: Any = None
    ) -> Any:
        self.mlp.row = None if packed_seq_params is None else packed_seq_params.routing
        try:
            return super()._forward_mlp(hidden_states, inference_context, padding_mask, packed_seq_params)
        finally:
            self.mlp.row = None


def route_by_rows(layer: ModuleSpec, family: Family, number: int) -> None:
    """Make a layer with experts route by rows."""
    assert family.experts is not None
    submodules = layer.submodules.mlp.keywords["submodules"]
    submodules.router = functools.partial(RowRouter, place=sum(family.experts.layers[:number]))
    layer.submodules.mlp = functools.partial(RowExperts, submodules=submodules)
    layer.module = RowLayer

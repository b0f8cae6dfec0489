"""Routing over a whole step: the routers' inputs for each row, and their results, summed over rows and ranks.

Each token of a step counts once: padding does not count, and of a prompt's copies (split groups, unshared layout) only one does.
Prompt tokens count like response tokens, because experts compute both. Only responses in rows have tokens. So loads, losses and
drift describe the step's groups, whatever the packing.

Legend: G groups, K responses of a group, L layers with experts, E experts of a layer, k experts of a token, U units.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.distributed import all_reduce

from mpo_megatron import device
from mpo_megatron.config import ExpertsConfig
from mpo_megatron.data.arrays import Bools, Int64
from mpo_megatron.data.loader import GroupTable, StepBatch
from mpo_megatron.data.packing import Row
from mpo_megatron.families.family import Experts
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.routing import Found, RowRouting, Terms, own_tokens, row_routing
from mpo_megatron.train.metrics import Mean


def group_tokens(table: GroupTable) -> Int64:
    """[G] input tokens of each group: its prompt, and its responses without their last."""
    tokens: Int64 = table.prompt_lengths + ((table.lengths - 1) * table.valid).sum(axis=1)
    return tokens


def counted_tokens(table: GroupTable, in_rows: Bools) -> Int64:
    """[G] input tokens of each group in rows, the prompt counted once."""
    tokens = table.prompt_lengths + ((table.lengths - 1) * in_rows).sum(axis=1)
    return np.where(in_rows.any(axis=1), tokens, 0)


@dataclass(frozen=True, kw_only=True)
class Choices:
    """The reference's choices for a step's groups, on this rank's device."""

    ids: Tensor
    """[Σ tokens, L, k] expert ids, group by group; uint8, or int32 with more than 256 experts."""
    starts: Int64
    """[G] start of each group."""

    def of(self, row: Row, ranks: Ranks) -> dict[int, Tensor]:
        """[T, k] for this rank's tokens of a row, by the layer's place; arbitrary for padding."""
        own = own_tokens(len(row.tokens), ranks)
        slots, places = row.slots[own], row.places[own]
        found = self.ids[device.upload(np.where(slots < 0, 0, self.starts[slots] + places))]
        return dict(enumerate(found.unbind(dim=1)))


class StepRouting:
    """The routers of one step, or of one batch of held-out groups: `rows` gives their inputs, `finish` collects results."""

    def __init__(
        self, config: ExpertsConfig, experts: Experts, batch: StepBatch, ranks: Ranks, choices: Choices | None = None
    ) -> None:
        self.config, self.experts, self.batch, self.ranks, self.choices = config, experts, batch, ranks, choices
        self.num_layers = sum(experts.layers)
        self.tokens = counted_tokens(batch.table, batch.in_rows)
        self.measured: dict[str, Mean] = {}
        """Measurements of `finish`, by metric name."""

    @property
    def adds_terms(self) -> bool:
        """Whether routers add to the loss, so that every token in rows gets a gradient from them."""
        return self.config.has_terms

    def rows(self, rows: Sequence[Row], *, learn: bool = False, loads: Tensor | None = None) -> list[RowRouting]:
        """The routers' inputs for these rows.

        Args:
            learn: gradients of the losses are computed; otherwise loads are counted, if the load-balancing loss needs them
            loads: [L, U, E] of the step, if known
        """
        by_group, balanced = self.config.balance_over == "group", self.config.balance_coeff > 0
        units = self.tokens if by_group else self.tokens.sum(keepdims=True)
        weights = np.divide(1.0, units.astype(float) ** 2, out=np.zeros(len(units)), where=units > 0)
        weights /= max(1, int((units > 0).sum()))
        terms = None
        if learn and self.config.has_terms:
            terms = Terms(
                balance_coeff=self.config.balance_coeff,
                z_coeff=self.config.z_coeff,
                unit_weight=device.upload(weights.astype(np.float32)),
                num_tokens=max(1, int(self.tokens.sum())),
                loads=loads,
            )
        return [
            row_routing(
                row,
                self.ranks,
                by_group=by_group,
                reference=None if self.choices is None else self.choices.of(row, self.ranks),
                replay=self.config.routing == "replay",
                terms=terms,
                count=len(units) if balanced and loads is None else 0,
            )
            for row in rows
        ]

    def loads(self, routings: Sequence[RowRouting]) -> Tensor | None:
        """[L, U, E] counted tokens per expert, over all rows of all ranks; None if not counted.

        Communication: a sum over all ranks, each of which has other tokens or layers.
        """
        if not (self.config.balance_coeff > 0 and routings):
            return None
        loads = torch.zeros(self.num_layers, routings[0].count, self.experts.num, device=device.device())
        for place, found in _all_found(routings):
            if found.loads is not None:
                loads[place] += found.loads
        all_reduce(loads)
        return loads

    def finish(self, routings: Sequence[RowRouting], *, drift: bool = True) -> None:
        """Measure the routers' results; all ranks call it, with their own rows.

        Communication: a sum over all ranks, each of which has other tokens or layers.

        Args:
            drift: whether to measure the share of choices that differ from the reference's: once per step
        """
        names = [name for name in ("balance", "z") if any(row.terms is not None for row in routings)]
        if drift and any(row.reference is not None for row in routings):
            names.append("agreed")
        if not names:
            return
        sums = torch.zeros(len(names), dtype=torch.float64, device=device.device())
        for _, found in _all_found(routings):
            for index, name in enumerate(names):
                value = getattr(found, name)
                if value is not None:
                    sums[index] += value
        all_reduce(sums)
        totals = dict(zip(names, sums.tolist(), strict=True))
        if "balance" in totals and self.config.balance_coeff > 0:
            self.measured["load_balancing_loss"] = Mean(totals["balance"], self.num_layers)
        if "z" in totals and self.config.z_coeff > 0:
            self.measured["router_z_loss"] = Mean(totals["z"], self.num_layers)
        if "agreed" in totals:
            number = int(self.tokens.sum()) * self.num_layers * self.experts.per_token
            self.measured["router_drift"] = Mean(number - totals["agreed"], number)


def unmeasured_drift(config: ExpertsConfig, experts: Experts | None, *, resident: bool) -> str | None:
    """Why a run does not report `router_drift`, and the fix; None if it does, or if the model has no experts."""
    if experts is None or resident or config.needs_choices:
        return None
    return "router_drift is not measured: the reference's expert choices are not recorded; set experts.measure_drift."


def _all_found(routings: Sequence[RowRouting]) -> list[tuple[int, Found]]:
    return [item for row in routings for item in sorted(row.found.items())]


def guide_rows(
    routings: Sequence[RowRouting | None],
    rows: Sequence[Row],
    recorded: Sequence[dict[int, Tensor]],
    ranks: Ranks,
    *,
    replay: bool,
) -> list[RowRouting]:
    """The rows' routing with the choices just made by a resident reference on the same rows and layout."""
    guided = []
    for row, routing, choices in zip(rows, routings, recorded, strict=True):
        told = routing or row_routing(row, ranks, replay=replay)
        told.reference = choices
        guided.append(told)
    return guided


def record_rows(rows: Sequence[Row], ranks: Ranks) -> list[RowRouting]:
    """Routing inputs that record the choices of a pass."""
    return [row_routing(row, ranks, record=True) for row in rows]


def recorded_choices(routing: RowRouting) -> dict[int, Tensor]:
    """[T, k] recorded choices of a pass over a row on this rank, by place."""
    return {place: found.choices for place, found in routing.found.items() if found.choices is not None}


def gather_choices(
    routings: Sequence[RowRouting], rows: Sequence[Row], table: GroupTable, experts: Experts, ranks: Ranks
) -> Choices:
    """The recorded choices of all ranks, on every rank; 0 for tokens in no row. All ranks call it.

    Communication: each counted token of each layer was seen by exactly one rank, so a sum over ranks gives every choice. Of a
    prompt's copies, which may differ by rounding, the counted one is used.
    """
    tokens = group_tokens(table)
    starts = np.cumsum(tokens) - tokens
    dtype = torch.uint8 if experts.num <= 256 else torch.int32
    shape = (int(tokens.sum()), sum(experts.layers), experts.per_token)
    everything = torch.zeros(shape, dtype=dtype, device=device.device())
    for row, routing in zip(rows, routings, strict=True):
        own = own_tokens(len(row.tokens), ranks)
        counted = np.flatnonzero(row.counted[own])
        here = own[counted]
        places, there = device.upload(starts[row.slots[here]] + row.places[here]), device.upload(counted)
        for place, found in routing.found.items():
            assert found.choices is not None
            everything[places, place] = found.choices[there]
    all_reduce(everything)
    return Choices(ids=everything, starts=starts)


class Recorder(StepRouting):
    """The routing of a reference pass over a batch's rows; keeps its choices in memory."""

    def rows(self, rows: Sequence[Row], *, learn: bool = False, loads: Tensor | None = None) -> list[RowRouting]:
        """Routing inputs that record choices."""
        return record_rows(rows, self.ranks)

    def finish(self, routings: Sequence[RowRouting], *, drift: bool = True) -> None:
        """Collect the recorded choices; all ranks call it."""
        self.choices = gather_choices(routings, self.batch.rows, self.batch.table, self.experts, self.ranks)

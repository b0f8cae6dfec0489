"""Run rows through a model with Megatron's schedule; shared by the policy and the resident reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.data.arrays import Int64
from mpo_megatron.data.packing import Row
from mpo_megatron.model.attention import RowLayout, row_layout
from mpo_megatron.model.routing import RowRouting


@dataclass(frozen=True, kw_only=True)
class RowTensors:
    """A row on this rank's device."""

    tokens: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T]"""
    layout: RowLayout
    sources: Int64
    """[S] row index of the token that predicts each scored token; on the host, see `Policy.own_sources`."""
    targets: Tensor
    """[S]"""
    response_of: Tensor
    """[S] index of each scored token's response in the row."""
    responses: Tensor
    """[R, 2] slot of the group in the step, index of the response in the group."""
    slots: Tensor
    """[g] slots of the row's groups in the step, ascending."""
    group_of: Tensor
    """[R] index of each response's group among the row's groups."""


def to_device(row: Row, routing: RowRouting | None = None) -> RowTensors:
    """Move a row to this rank's device in one copy; its layout carries the routers' inputs."""
    slots, group_of = np.unique(row.responses[:, 0], return_inverse=True)
    parts = (row.tokens, row.position_ids, row.targets, row.response_of, row.responses.ravel(), slots, group_of)
    moved = device.upload(np.concatenate(parts)).split([len(part) for part in parts])
    tokens, position_ids, targets, response_of, responses, slots_there, group_of_there = moved
    return RowTensors(
        tokens=tokens[None],
        position_ids=position_ids[None],
        layout=row_layout(row.segments, routing),
        sources=row.sources,
        targets=targets,
        response_of=response_of,
        responses=responses.view(-1, 2),
        slots=slots_there,
        group_of=group_of_there,
    )


LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Any]]
"""From a row's output on the last stage to (scalar to backpropagate, unused count, values to collect)."""

ForwardStep = Callable[[Any, Any], tuple[Tensor, LossFunction]]
"""From an iterator over (index, row) and a part of the model to the part's output for the next row, and the loss function."""


def run_schedule(
    model: Sequence[torch.nn.Module], rows: Sequence[Row], forward_step: ForwardStep, *, forward_only: bool
) -> list[Any]:
    """Forward pass of all rows, and backward unless `forward_only`; the model's config defines how gradients are finalized.

    Returns:
        On the last pipeline stage, what the loss function collected, by row.
    """
    for part in model:
        part.train(not forward_only)
    # Interleaved schedules pass each row to each part of the model, in turn.
    iterators = [iter(enumerate(rows)) for _ in model]
    with torch.set_grad_enabled(not forward_only):
        collected: list[Any] = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators[0] if len(model) == 1 else iterators,
            model=list(model),
            num_microbatches=len(rows),
            seq_length=max(len(row.tokens) for row in rows),
            micro_batch_size=1,
            forward_only=forward_only,
        )
    return collected

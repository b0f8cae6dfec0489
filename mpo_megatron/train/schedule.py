"""Rows through a model by Megatron's schedule: what the policy's passes and the resident reference's share."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.data.packing import Row
from mpo_megatron.model.attention import RowLayout, row_layout
from mpo_megatron.model.precision import scales


@dataclass(frozen=True, kw_only=True)
class RowTensors:
    """A row on this rank's device."""

    tokens: Tensor
    """[1, T]"""
    position_ids: Tensor
    """[1, T]"""
    layout: RowLayout
    sources: Tensor
    """[S] index of the token that predicts each scored token."""
    targets: Tensor
    """[S]"""
    response_of: Tensor
    """[S] which response of the row a scored token belongs to."""
    responses: Tensor
    """[R, 2] slot of the group in the step, index of the response in the group."""


def to_device(row: Row) -> RowTensors:
    """Move a row to this rank's device."""

    def move(values: np.ndarray[Any, Any]) -> Tensor:
        return torch.from_numpy(values).to(device.device(), non_blocking=True)

    return RowTensors(
        tokens=move(row.tokens)[None],
        position_ids=move(row.position_ids)[None],
        layout=row_layout(row.segments),
        sources=move(row.sources),
        targets=move(row.targets),
        response_of=move(row.response_of),
        responses=move(row.responses),
    )


LossFunction = Callable[[Tensor], tuple[Tensor, Tensor, Any]]
"""From a row's output on the last stage to (scalar to backpropagate, unused count, what the schedule collects)."""

ForwardStep = Callable[[Any, Any], tuple[Tensor, LossFunction]]
"""From an iterator over (index, row) and a part of the model to the part's output for the next row, and the loss function."""


def run_schedule(
    model: Sequence[torch.nn.Module], rows: Sequence[Row], forward_step: ForwardStep, *, forward_only: bool
) -> list[Any]:
    """Forward, and unless `forward_only` backward, of all rows; gradients are finished as the model's config says.

    Returns:
        On the last pipeline stage what the loss function collected, by row.
    """
    for part in model:
        part.train(not forward_only)
    # Interleaved schedules hand each row to each part of the model, in turn.
    iterators = [iter(enumerate(rows)) for _ in model]
    with torch.set_grad_enabled(not forward_only), scales(model, forward_only=forward_only):
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

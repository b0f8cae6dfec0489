"""The first scales of `model.fp8 = delayed`: measured on the first groups of the training data, before anything is computed.

Fresh from a checkpoint all scales are 1: weights of 0.02 would lose most of their bits, and small gradients all of them. And
the reference must see the very scales that the policy starts with, or the log-ratio would not start at 0. Both models are given
scales by the same passes over the same rows; from there on the reference's stay, and the policy's follow its training.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import forget_scales, has_delayed_scales
from mpo_megatron.train.reference import select_all
from mpo_megatron.train.schedule import RowTensors
from mpo_megatron.train.step import run_rows

GROUPS = 16
"""Groups that are looked at: enough for the largest value of most tensors to be near its usual one."""
PASSES = 2
"""The first pass runs under scales of 1 and so measures values that are somewhat off; the second one mends that."""


def calibrate(model: Sequence[torch.nn.Module], data: PreparedGroups, ranks: Ranks, shape: RowShape) -> None:
    """Set the delayed scales of a model whose weights were just loaded; all ranks call it. Other recipes need none.

    The gradients behind the gradients' scales are those of the mean log-prob, whose size is about that of the losses'. Nothing
    else of the passes remains: call it before the model has gradient buffers.
    """
    if not has_delayed_scales(model[0]):
        return
    forget_scales(model)
    trained = [parameter for part in model for parameter in part.parameters() if parameter.requires_grad]
    batch = build_step(0, data, np.arange(min(GROUPS, len(data))), select_all, shape)
    num_responses = int(batch.in_rows.sum())

    def mean_logp(row: RowTensors, token_logps: Tensor, token_kl: Tensor | None) -> Tensor:
        return token_logps.sum() / num_responses

    for _ in range(PASSES):
        run_rows(list(model), batch.rows, ranks, mean_logp)
    for parameter in trained:
        parameter.grad = None

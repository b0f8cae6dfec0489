"""β · KL(π ‖ π_ref) on samples of the policy, as rows beside those of the loss.

With samples y_n of prompts x_n, n = 1 … N:   β/N Σ_n Σ_t KL( π(·| x_n, y_n,<t) ‖ π_ref(·| x_n, y_n,<t) ), the inner KL exact over
the whole vocabulary. The gradient flows through π's distributions at the sampled positions; the samples are constants.
Source: SPO, Eq. 15.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import GroupTable, RowShape, group_table, pack
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.train.objective import Logps
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.step import RowTensors, collect_logps, run_rows
from mpo_megatron.train.term import unreduced_gradients


def add_kl_gradients(
    model: list[Any],
    samples: Sequence[TokenizedGroup],
    kl_weight: float,
    ranks: Ranks,
    shape: RowShape,
    resident: Resident,
) -> tuple[Logps, GroupTable]:
    """Add the regulariser's gradients to the model's buffers, before the reduction over replicas; all ranks call it.

    Args:
        samples: of all replicas, each prompt with its samples; the same on every rank
        kl_weight: β
        resident: the reference model
    Returns:
        Log-probs and divergences of the samples, and the table that marks padding; the same on every rank.
    """
    table = group_table(samples, np.arange(len(samples)))
    _, rows = pack(table, samples, table.valid, shape)
    # Mean over the samples of all replicas: Megatron sums rows and replicas without dividing (see train/step.py).
    scale = kl_weight / int(table.valid.sum())

    def row_loss(row: RowTensors, token_logps: Tensor, token_kl: Tensor | None) -> Tensor:
        assert token_kl is not None
        return scale * token_kl.sum()  # 0 for a filler row without tokens, but with a graph that the schedule can backpropagate

    with unreduced_gradients(model):
        outputs = run_rows(model, rows, ranks, row_loss, resident)
    return collect_logps(outputs, table.valid.shape, ranks, kl=True), table

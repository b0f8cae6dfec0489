"""A warning before the first step: reward weights that leave groups without a gradient.

`wmpo` and `swepo` shift a response's logit by its reward's distance from the group's mean. If this puts nearly all mass on the
preferred responses, the loss and its gradient are near 0, whatever the policy does.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import group_table
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.train.objective import Logps, Objective, group_batch

WEIGHTED = ("wmpo", "swepo")
"""Losses with such weights."""
DEAD = 1e-3
"""Largest gradient of a dead group, in units of β; DPO starts with 0.5."""
SAMPLED_GROUPS = 512
"""Number of sampled groups."""
WARN_ABOVE = 0.1
"""Share of dead groups that triggers the warning."""


def warn_dead_gradients(objective: Objective, data: PreparedGroups) -> str | None:
    """The warning; None if few groups start without a gradient, or the loss has no such weights."""
    if objective.loss.name not in WEIGHTED:
        return None
    indices = np.unique(np.linspace(0, len(data) - 1, min(len(data), SAMPLED_GROUPS)).astype(int))
    share = dead_share(objective, [data[int(index)] for index in indices])
    if share <= WARN_ABOVE:
        return None
    params = objective.params
    lighter = "Raise" if getattr(params, "weighting", "exp") == "listing" else "Lower"  # there, α is a divisor
    signed = getattr(params, "deviation", "absolute") == "signed"
    return (
        f"loss.params.alpha = {params.alpha:g} leaves {share:.0%} of {len(indices)} sampled groups a gradient below {DEAD:g} β "
        f"at the start: the weights of their preferred responses already decide the loss. {lighter} loss.params.alpha, or scale "
        f"the rewards down{', or set loss.params.deviation = absolute' if signed else ''}."
    )


def dead_share(objective: Objective, groups: Sequence[TokenizedGroup]) -> float:
    """Share of contributing groups whose responses all have a gradient below `DEAD` when the policy equals its reference."""
    table = group_table(groups, np.arange(len(groups)))
    contributes, _ = objective.select(table)
    if not contributes.any():
        return 0.0
    policy = torch.zeros(table.valid.shape, dtype=torch.float64, requires_grad=True)
    reference = Logps(response=torch.zeros(table.valid.shape, dtype=torch.float64))
    losses = objective.compute(group_batch(table, Logps(response=policy), reference))
    (gradient,) = torch.autograd.grad(losses.sum(), policy)
    largest = gradient.abs().amax(dim=-1).numpy()[contributes] / objective.params.beta
    return float((largest < DEAD).mean())

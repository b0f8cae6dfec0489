"""Losses over groups of responses: every method by one name, as a pure function of a [groups, responses] matrix.

    from mpo_megatron.losses import group_loss

    losses = group_loss("mpo", policy_logps, reference_logps, rewards, beta=0.01)  # [groups], nats
    losses.mean().backward()

Imports PyTorch and nothing else. `registry.py` shows how to add a method.
"""

from mpo_megatron.losses import (  # noqa: F401  (importing a file registers its methods)
    listwise,
    montecarlo,
    offline_rl,
    pairwise,
    reference_free,
    reward,
    setwise,
    soft,
    supervised,
    unpaired,
)
from mpo_megatron.losses.batch import GroupBatch
from mpo_megatron.losses.checked import group_loss
from mpo_megatron.losses.partition import PartitionParams, compute_partition
from mpo_megatron.losses.registry import Loss, Needs, build_params, get_loss, list_losses, register

__all__ = [
    "GroupBatch",
    "Loss",
    "Needs",
    "PartitionParams",
    "build_params",
    "compute_partition",
    "get_loss",
    "group_loss",
    "list_losses",
    "register",
]

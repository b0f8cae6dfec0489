"""A model's weights, read or gathered in another way than by Megatron-Core's forward pass."""

from __future__ import annotations

from typing import Any

from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing


def unwrap(part: Any) -> Any:
    """The policy in its wrappers (DistributedDataParallel, Float16Module)."""
    while hasattr(part, "module"):
        part = part.module
    return part


def gather_now(part: Any) -> None:
    """Gather a part's weights from the shards of all ranks, and have those in FP8 transposed for the backward pass.

    Megatron-Core transposes them in the next forward pass, but not if that finds them gathered already: it would then take the
    weights of the step before for its gradients.
    """
    part.start_param_sync(force_sync=True)
    post_all_gather_processing([parameter for parameter in part.parameters() if is_float8tensor(parameter)])

"""Read or gather a model's weights outside of Megatron-Core's forward pass."""

from __future__ import annotations

from typing import Any

from megatron.core.fp8_utils import is_float8tensor, post_all_gather_processing


def unwrap(part: Any) -> Any:
    """Remove a policy's wrappers (DistributedDataParallel, Float16Module)."""
    while hasattr(part, "module"):
        part = part.module
    return part


def gather_now(part: Any) -> None:
    """Gather a part's weights from all ranks' shards, and transpose FP8 weights for the backward pass.

    Megatron-Core transposes them in the next forward pass, but not if they are already gathered: it would then compute gradients
    with the previous step's weights.
    """
    part.start_param_sync(force_sync=True)
    post_all_gather_processing([parameter for parameter in part.parameters() if is_float8tensor(parameter)])

"""Gather optimizer states for a checkpoint from the ranks that shard them.

A checkpoint stores them in the shapes of the weights, which any layout can read; the distributed optimizer holds ranges of flat
buffers. Megatron-Core gathers all states of a rank's weights on every rank, whole buffers at a time on the GPU: for 7 billion
weights, 91 GB of each rank's host memory, and 60 GB of its GPU's. Here a rank keeps only what it writes, and the GPU holds one
piece at a time. A rank also reads only the states of weights that it holds a part of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather_into_tensor

from mpo_megatron import device

PIECE = 1 << 26
"""Numbers gathered at a time, from all ranks together: 256 MiB."""

KINDS = ("param", "exp_avg", "exp_avg_sq")
"""Megatron-Core's names of master weights and moments."""


@dataclass(frozen=True, kw_only=True)
class Reserved:
    """Host buffers for the states of one gradient buffer's weights, from all ranks that share them."""

    optimizer: Any
    """Megatron-Core's DistributedOptimizer."""
    buffer: int
    """Index of the gradient buffer."""
    numbers: dict[str, Tensor]
    """[weights of the buffer] float32 on the host, by kind. Never written, so it takes no memory."""


Place = tuple[int, int, Tensor]
"""Start and end of a range of a buffer's numbers, and the tensor [end − start] that receives it."""


@contextlib.contextmanager
def reserving(optimizer: MegatronOptimizer) -> Iterator[list[Reserved]]:
    """Within this context, the optimizer's sharded state dict refers to reserved buffers, not yet filled."""
    reserved: list[Reserved] = []
    with contextlib.ExitStack() as stack:
        for single in getattr(optimizer, "chained_optimizers", [optimizer]):
            if not getattr(single, "is_stub_optimizer", False):
                single.get_parameter_state_dp_zero = _reserve(single, reserved)
                stack.callback(delattr, single, "get_parameter_state_dp_zero")
        yield reserved


def _reserve(single: Any, reserved: list[Reserved]) -> Callable[..., dict[Any, Any]]:
    """Replacement for the optimizer's method that gathers everything."""

    def reserve(**_: Any) -> dict[Any, Any]:
        state: dict[Any, Any] = {"buckets_coalesced": True}
        for index, ranges in enumerate(single.gbuf_ranges):
            size = single.buffers[index].numel_unpadded
            # NumPy's zeros, unlike torch's, are pages that the system allocates at the first write.
            numbers = {kind: torch.from_numpy(np.zeros(size, dtype=np.float32)) for kind in KINDS}
            reserved.append(Reserved(optimizer=single, buffer=index, numbers=numbers))
            state[index] = {dtype: {**numbers, "numel_unpadded": size} for dtype in ranges}
        return state

    return reserve


def own_share(optimizer: Any, states: dict[int, Any]) -> dict[int, Any]:
    """The states, by number, of one DistributedOptimizer's weights that this rank holds a part of."""
    weights = ((weight, room) for room in range(len(optimizer.buffers)) for weight in optimizer.buffers[room].param_index_map)
    held = [
        {weight for bucket in buckets for weight in bucket["param_map"]}
        for ranges in optimizer.gbuf_ranges
        for buckets in ranges.values()
    ]
    return {number: states[number] for number, (weight, room) in enumerate(weights) if weight in held[room]}


class SaveOwnShare(FullyParallelSaveStrategyWrapper):
    """Megatron-Core's strategy that distributes writing over replicas; each rank then gathers its share."""

    def __init__(self, strategy: Any, group: ProcessGroup, reserved: Sequence[Reserved]) -> None:
        super().__init__(strategy, group)
        self.reserved = reserved

    def apply_saving_parallelization(self, sharded_state_dict: Any) -> None:
        """Decide which rank writes what, and gather it."""
        super().apply_saving_parallelization(sharded_state_dict)
        tensors = [value for value in nested_values(sharded_state_dict) if isinstance(value, ShardedTensor)]
        places: dict[int, list[Place]] = {}
        for tensor in tensors:
            if not is_main_replica(tensor.replica_id):
                continue
            if tensor.key.startswith("optimizer.state."):
                assert tensor.data.is_contiguous(), tensor.key
                room, start = tensor.data.untyped_storage().data_ptr(), tensor.data.storage_offset()
                # A separate buffer: the writer would copy a view of the reserved one.
                tensor.data = torch.empty_like(tensor.data)
                places.setdefault(room, []).append((start, start + tensor.data.numel(), tensor.data.view(-1)))
            elif tensor.data.device.type == "cpu":  # training will change it, but the writer copies from GPUs only
                tensor.data = tensor.data.detach().clone()
        for room in self.reserved:
            wanted = {kind: places.pop(numbers.untyped_storage().data_ptr(), []) for kind, numbers in room.numbers.items()}
            fill(room, wanted)
        assert not places, "states on another device"


def fill(room: Reserved, wanted: dict[str, list[Place]]) -> None:
    """Copy the requested ranges of a buffer's numbers to their tensors; all ranks that share the states call it.

    Communication: an all-gather of each piece over these ranks; no gradients.

    Args:
        wanted: ranges by kind
    """
    group = room.optimizer.data_parallel_group
    first = 0  # first number of the bucket
    for bucket, ranges in zip(room.optimizer.buffers[room.buffer].buckets, _bucket_ranges(room), strict=True):
        share = bucket.grad_data.numel() // group.size()
        held = [
            (place["gbuf_local"].start, place["gbuf_local"].end, room.optimizer._get_main_param_and_optimizer_states(weight))
            for weight, place in ranges["param_map"].items()
        ]
        piece = min(share, max(1, PIECE // group.size()))
        whole_own = torch.empty(piece, device=device.device())
        whole_gathered = whole_own.new_empty(group.size() * piece)
        for begin in range(0, share, piece):
            size = min(piece, share - begin)
            for kind in room.numbers:
                own, gathered = whole_own[:size].zero_(), whole_gathered[: group.size() * size]
                for start, end, states in held:
                    low, high = max(start, begin), min(end, begin + size)
                    if low < high:
                        own[low - begin : high - begin] = states[kind].detach().view(-1)[low - start : high - start]
                all_gather_into_tensor(gathered, own, group=group)
                for rank, part in enumerate(gathered.split(size)):
                    offset = rank * share + begin  # offset in the bucket, which ends with padding
                    valid = max(0, min(size, bucket.numel_unpadded - offset))
                    _copy_wanted(part[:valid], first + offset, wanted[kind])
        first += bucket.numel_unpadded


def _bucket_ranges(room: Reserved) -> list[dict[str, Any]]:
    """The ranges of each bucket that this rank holds."""
    [ranges] = room.optimizer.gbuf_ranges[room.buffer].values()
    return list(ranges)


def _copy_wanted(part: Tensor, first: int, wanted: Sequence[Place]) -> None:
    """Copy the wanted ranges out of `part`, which starts at `first`."""
    for start, end, target in wanted:
        low, high = max(start, first), min(end, first + len(part))
        if low < high:
            target[low - start : high - start] = part[low - first : high - first].cpu()

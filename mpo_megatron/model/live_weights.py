"""The policy's weights as they are now, under their Hugging Face names, from the shards that ranks hold: nothing is written.

Every rank says which boxes of which checkpoint tensors it holds (`sharded_state_dict`, from which a checkpoint would be written),
so that any layout over tensor, pipeline, virtual-pipeline and expert-parallel ranks is the same to this module. The weight map
says which rows of those tensors make up a Hugging Face tensor, as it does for conversion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import force_all_tensors_to_non_fp8
from torch import Tensor
from torch.distributed import all_gather_object, broadcast, get_rank, get_world_size

from mpo_megatron import device
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import ADAPTER, Adapter
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.weight_map import Slice, build_adapter_map, build_weight_map

Receive = Callable[[str, Tensor], None]
"""Takes one whole weight by its Hugging Face name, on this rank's device; the tensor may not be kept without a copy."""


@dataclass(frozen=True)
class Box:
    """A part of a checkpoint tensor that some rank holds."""

    key: str
    offsets: tuple[int, ...]
    """Where it begins in the checkpoint tensor."""
    sizes: tuple[int, ...]
    """Its shape with all axes of the checkpoint tensor."""
    dtype: torch.dtype


def send_weights(model: Sequence[Any], family: Family, padded_vocab: int, ranks: Ranks, receive: Receive | None) -> None:
    """Give the policy's weights, one after the other, to every rank that wants them; all ranks call it.

    With adapters these are the base model's weights.

    Communication: each box is broadcast to all ranks by one that holds it. One weight exists as a whole at a time.

    Args:
        model: this rank's parts of the policy
        receive: what to do with a weight; None if this rank wants none
    Raises:
        RuntimeError: ranks together do not hold a tensor that the weight map names.
    """
    _send(build_weight_map(family, padded_vocab), held_boxes(model, ranks, adapters=False), receive)


def send_adapter(model: Sequence[Any], family: Family, adapter: Adapter, ranks: Ranks, receive: Receive | None) -> None:
    """The same for the matrices of the policy's adapter, under PEFT's names."""
    _send(build_adapter_map(family, adapter), held_boxes(model, ranks, adapters=True), receive)


def _send(slices: Sequence[Slice], held: dict[Box, Tensor], receive: Receive | None) -> None:
    owners = _find_owners(list(held))
    for item in slices:
        whole: Tensor | None = None
        filled = 0
        for box, owner in owners[item.key]:
            place = place_in(box, item)
            if place is None:
                continue
            data = held[box] if owner == get_rank() else torch.empty(box.sizes, dtype=box.dtype, device=device.device())
            data = data.contiguous()
            if get_world_size() > 1:
                broadcast(data, src=owner)
            filled += data.numel()
            if receive is not None:
                whole = torch.empty(item.shape, dtype=box.dtype, device=data.device) if whole is None else whole
                whole[place] = data.view(whole[place].shape)
        if filled != torch.Size(item.shape).numel():
            raise RuntimeError(f"{item.key}: ranks hold {filled} of {torch.Size(item.shape).numel()} values.")
        if receive is not None and whole is not None:
            _hand_out(whole, item, receive)


def _hand_out(whole: Tensor, item: Slice, receive: Receive) -> None:
    """The Hugging Face tensors that a Megatron tensor is made of."""
    for placement in item.placements:
        tensor = whole.new_empty(placement.shape)
        for run in placement.runs:
            tensor[run.hf_row : run.hf_row + run.num_rows] = whole[run.megatron_row : run.megatron_row + run.num_rows]
        receive(placement.name, tensor)


def place_in(box: Box, item: Slice) -> tuple[slice, ...] | None:
    """Where a box lies in a slice; None if it belongs to another layer."""
    leading = len(item.global_shape) - len(item.shape)
    if box.offsets[:leading] != item.index:
        return None
    return tuple(slice(start, start + size) for start, size in zip(box.offsets[leading:], box.sizes[leading:], strict=True))


def held_boxes(model: Sequence[Any], ranks: Ranks, *, adapters: bool) -> dict[Box, Tensor]:
    """The boxes that this rank's parts of the model hold, of its adapters or of all else; their data is the model's own."""
    boxes = {}
    for part in model:
        while hasattr(part, "module"):  # DistributedDataParallel, Float16Module
            part = part.module
        state = part.sharded_state_dict(metadata={"dp_cp_group": ranks.groups.dp_cp})
        force_all_tensors_to_non_fp8(state)  # the bf16 numbers that FP8 weights stand for, as in a checkpoint
        apply_factories(state)
        for tensor in nested_values(state):
            if isinstance(tensor, ShardedTensor) and tensor.data is not None and (ADAPTER in tensor.key) == adapters:
                sizes = (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape)
                box = Box(tensor.key, tuple(tensor.global_offset), sizes, tensor.dtype)
                boxes[box] = tensor.data.detach().reshape(sizes)
    return boxes


def _find_owners(own: list[Box]) -> dict[str, list[tuple[Box, int]]]:
    """Every box of every tensor with the lowest rank that holds it, in the same order on all ranks."""
    everyone: list[list[Box]] = [own]
    if get_world_size() > 1:
        everyone = [[] for _ in range(get_world_size())]
        all_gather_object(everyone, own)
    owner: dict[Box, int] = {}
    for rank, boxes in enumerate(everyone):
        for box in boxes:
            owner.setdefault(box, rank)
    owners: dict[str, list[tuple[Box, int]]] = defaultdict(list)
    for box, rank in owner.items():
        owners[box.key].append((box, rank))
    return owners

"""The policy's current weights under their Hugging Face names, gathered from the ranks' shards without writing files.

Every rank lists the boxes of checkpoint tensors that it holds (`sharded_state_dict`, which checkpoints are also written from).
So this module handles any layout over tensor, pipeline, virtual-pipeline and expert-parallel ranks alike. The weight map
tells which rows of those tensors form a Hugging Face tensor, as in conversion.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
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
from mpo_megatron.mcore.weights import unwrap
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.weight_map import Slice, build_adapter_map, build_weight_map


@dataclass(frozen=True)
class Box:
    """A part of a checkpoint tensor, held by some rank."""

    key: str
    offsets: tuple[int, ...]
    """Its start in the checkpoint tensor."""
    sizes: tuple[int, ...]
    """Its shape on all axes of the checkpoint tensor."""
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightInfo:
    """One whole weight, as in a Hugging Face checkpoint."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class LiveWeights:
    """Weights of the policy under their Hugging Face names, on any layout; all ranks make the same calls."""

    def __init__(self, model: Sequence[Any], ranks: Ranks, slices: Sequence[Slice], *, adapters: bool) -> None:
        """Store the parts; nothing is communicated yet.

        Args:
            model: this rank's parts of the policy
            slices: the Megatron tensors that form the weights
            adapters: gather the adapter's matrices; otherwise everything else
        """
        self.model, self.ranks, self.slices, self.adapters = model, ranks, slices, adapters

    @classmethod
    def of_policy(cls, model: Sequence[Any], family: Family, padded_vocab: int, ranks: Ranks) -> LiveWeights:
        """The policy's weights; with adapters, the base model's."""
        return cls(model, ranks, build_weight_map(family, padded_vocab), adapters=False)

    @classmethod
    def of_adapter(cls, model: Sequence[Any], family: Family, adapter: Adapter, ranks: Ranks) -> LiveWeights:
        """The matrices of the policy's adapter, under PEFT's names."""
        return cls(model, ranks, build_adapter_map(family, adapter, padded_vocab(model)), adapters=True)

    @cached_property
    def metadata(self) -> list[WeightInfo]:
        """Every weight, in the order of `stream`: layer by layer.

        Communication: at the first call, all ranks exchange lists of what they hold.
        """
        return [
            WeightInfo(placement.name, placement.shape, self._owners[item.key][0][0].dtype)
            for item in self.slices
            for placement in item.placements
        ]

    def stream(self, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield the current weights in order, on this rank's device; all ranks must exhaust the iterator.

        Communication: each box is broadcast to all ranks by one that holds it. One whole weight exists at a time.

        Args:
            wanted: whether this rank needs them; if not, it takes part and yields nothing
        Raises:
            RuntimeError: all ranks together lack part of a tensor that the weight map names.
        """
        held = held_boxes(self.model, self.ranks, adapters=self.adapters)
        for item in self.slices:
            whole: Tensor | None = None
            filled = 0
            for box, owner in self._owners[item.key]:
                place = place_in(box, item)
                if place is None:
                    continue
                data = held[box] if owner == get_rank() else torch.empty(box.sizes, dtype=box.dtype, device=device.device())
                data = data.contiguous()
                if get_world_size() > 1:
                    broadcast(data, src=owner)
                filled += data.numel()
                if wanted:
                    whole = torch.empty(item.shape, dtype=box.dtype, device=data.device) if whole is None else whole
                    whole[place] = data.view(whole[place].shape)
            if filled != torch.Size(item.shape).numel():
                raise RuntimeError(f"{item.key}: ranks hold {filled} of {torch.Size(item.shape).numel()} values.")
            if whole is not None:
                yield from _tensors_of(whole, item)

    @cached_property
    def _owners(self) -> dict[str, list[tuple[Box, int]]]:
        """The boxes of each checkpoint tensor, and the rank that broadcasts each."""
        return _find_owners(list(held_boxes(self.model, self.ranks, adapters=self.adapters)))


def padded_vocab(model: Sequence[Any]) -> int:
    """The padded vocabulary size with which the policy's parts were built."""
    size: int = unwrap(model[0]).padded_vocab_size
    return size


def _tensors_of(whole: Tensor, item: Slice) -> Iterator[tuple[str, Tensor]]:
    """The Hugging Face tensors that form a Megatron tensor, as copies."""
    for placement in item.placements:
        yield placement.name, placement.gather(whole)


def place_in(box: Box, item: Slice) -> tuple[slice, ...] | None:
    """The position of a box in a slice; None if it belongs to another layer."""
    leading = len(item.global_shape) - len(item.shape)
    if box.offsets[:leading] != item.index:
        return None
    return tuple(slice(start, start + size) for start, size in zip(box.offsets[leading:], box.sizes[leading:], strict=True))


def held_boxes(model: Sequence[Any], ranks: Ranks, *, adapters: bool) -> dict[Box, Tensor]:
    """The boxes held by this rank's parts of the model, of its adapters or of everything else; data is not copied."""
    boxes = {}
    for part in model:
        state = unwrap(part).sharded_state_dict(metadata={"dp_cp_group": ranks.groups.dp_cp})
        force_all_tensors_to_non_fp8(state)  # FP8 weights as bf16 numbers, as in a checkpoint
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

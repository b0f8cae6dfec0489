"""Initial values of an adapter's matrices: random numbers independent of the layout, or those of an existing adapter."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed import all_reduce

from mpo_megatron import device
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.model.adapters import linear_adapters_of
from mpo_megatron.model.live_weights import held_boxes, padded_vocab, place_in
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.weight_map import build_adapter_map


@torch.no_grad()
def fill_adapters(
    model: Sequence[Any], family: Family, adapter: Adapter, ranks: Ranks, provide: Callable[[str, tuple[int, ...]], Tensor]
) -> None:
    """Fill this rank's parts of an adapter's matrices.

    Args:
        provide: returns a whole matrix by its PEFT name and shape; called only for matrices of which this rank holds a part
    """
    boxes = defaultdict(list)
    held = held_boxes(model, ranks, adapters=True)
    for box in held:
        boxes[box.key].append(box)
    for item in build_adapter_map(family, adapter, padded_vocab(model)):
        for box in boxes[item.key]:
            place = place_in(box, item)
            if place is not None:
                (placement,) = item.placements
                part = placement.scatter(provide(placement.name, placement.shape), item.shape)[place]
                held[box].view(part.shape).copy_(part)


def initialize_adapters(model: Sequence[Any], family: Family, adapter: Adapter, ranks: Ranks, seed: int) -> None:
    """A as PEFT draws it (uniform, Kaiming's bound with a = √5), B = 0: the model's outputs stay the same.

    Each matrix is drawn in float32 on the CPU, from `seed` and its name: the same on any layout.
    """
    fill_adapters(model, family, adapter, ranks, lambda name, shape: initial_matrix(name, shape, seed))


def initial_matrix(name: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """A whole matrix before training, by its PEFT name."""
    if name.endswith(".lora_B.weight"):
        return torch.zeros(shape)
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)


@torch.no_grad()
def adapter_norm(model: Sequence[Any], ranks: Ranks) -> float:
    """Frobenius norm of the adapter's whole update of the weights, scale · B · A over all layers; all ranks call it.

    ‖BA‖² = Σ (BᵀB ∘ AAᵀ) avoids products of the weights' size. Communication: sums of [rank, rank] matrices over the ranks that
    share a layer, then of one number over ranks with other layers and experts.
    """
    total = torch.zeros((), dtype=torch.float64, device=device.device())
    expert_total = torch.zeros_like(total)
    for part in model:
        for layer in linear_adapters_of(part):
            for pair in layer.pairs:
                down, up = pair.lora_A.double(), pair.lora_B.double()
                inner, outer = down @ down.T, up.T @ up
                if layer.group.size() > 1:
                    all_reduce(outer if layer.plan.column else inner, group=layer.group)
                square = (inner * outer).sum() * layer.plan.scale**2
                (expert_total if layer.expert else total).add_(square)
    if ranks.groups.ep.size() > 1:
        all_reduce(expert_total, group=ranks.groups.ep)
    total += expert_total
    if ranks.pipeline.size() > 1:
        all_reduce(total, group=ranks.pipeline)
    return math.sqrt(float(total))

"""A model's weights with an adapter added to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from mpo_megatron.families import Family
from mpo_megatron.families.adapters import PEFT_PREFIX, Adapter, is_adaptable, leaf
from mpo_megatron.model.nf4 import rounded


@dataclasses.dataclass
class Rounding:
    """How far merged weights are from what the adapter adds, over all of them."""

    added: float = 0.0
    """Sum of squares of scale · B · A."""
    lost: float = 0.0
    """Sum of squares of what rounding to the weights' dtype changes of the sum."""

    def describe(self) -> str:
        """For the terminal."""
        share = (self.lost / self.added) ** 0.5 if self.added else 0.0
        return f"merged: the adapter adds {self.added**0.5:.3e} (Frobenius norm); rounding changes {share:.2%} of it"


Change = Callable[[str, int, Tensor], Tensor]
"""Rows of a weight, by its Hugging Face name and first row → their replacement."""


def trained_merger(family: Family, adapter: Adapter, matrices: dict[str, Tensor], rounding: Rounding | None) -> Change:
    """As `merger`, to the weights that the adapter was trained beside: those in 4 bits are rounded to them first."""
    merge = merger(adapter, matrices, rounding)
    if adapter.quantize == "none":
        return merge
    linear = {name for rule in family.rules if is_adaptable(rule) for name in map(leaf, rule.parts)}

    def merge_rounded(name: str, first: int, rows: Tensor) -> Tensor:
        return merge(name, first, rounded(rows) if leaf(name) in linear else rows)

    return merge_rounded


def merger(adapter: Adapter, matrices: dict[str, Tensor], rounding: Rounding | None) -> Change:
    """What turns rows of a base model's weight, by its Hugging Face name and first row, into those of the merged one.

    W + scale · B · A is summed in float32 (float64 for float32 weights), then rounded once to the weight's dtype.

    Args:
        matrices: A and B of every layer, by their names in PEFT
        rounding: to be added to
    """

    def merge(name: str, first: int, rows: Tensor) -> Tensor:
        prefix = PEFT_PREFIX + name.removesuffix(".weight")
        down = matrices.get(f"{prefix}.lora_A.weight")
        if down is None:
            return rows
        up = matrices[f"{prefix}.lora_B.weight"][first : first + len(rows)]
        exact = torch.float64 if rows.dtype is torch.float32 else torch.float32
        added = adapter.scale * (up.to(exact) @ down.to(exact))
        total = rows.to(exact) + added
        merged = total.to(rows.dtype)
        if rounding is not None:
            rounding.added += float(added.double().square().sum())
            rounding.lost += float((merged.to(exact) - total).double().square().sum())
        return merged

    return merge

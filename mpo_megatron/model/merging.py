"""Merge an adapter into a model's weights."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor
from transformers import PretrainedConfig

from mpo_megatron.families import Family
from mpo_megatron.families.adapters import PEFT_PREFIX, Adapter, is_adaptable, leaf, splits_tied
from mpo_megatron.families.rules import OUTPUT
from mpo_megatron.model.nf4 import rounded


@dataclasses.dataclass
class Rounding:
    """Size of the rounding of merged weights, relative to the adapter's update, over all weights."""

    added: float = 0.0
    """Sum of squares of scale · B · A."""
    lost: float = 0.0
    """Sum of squares of the differences that rounding to the weights' dtype makes."""

    def describe(self) -> str:
        """A line for the terminal."""
        share = (self.lost / self.added) ** 0.5 if self.added else 0.0
        return f"merged: the adapter adds {self.added**0.5:.3e} (Frobenius norm); rounding changes {share:.2%} of it"


Named = tuple[str, Tensor]
"""A weight's Hugging Face name and the weight."""

Change = Callable[[str, int, Tensor], Tensor]
"""Function from a weight's Hugging Face name, first row and rows to the replacement of those rows."""


def trained_merger(family: Family, adapter: Adapter, matrices: dict[str, Tensor], rounding: Rounding | None) -> Change:
    """Like `merger`, but onto the weights used in training: 4-bit weights are rounded first."""
    merge = merger(adapter, matrices, rounding)
    if adapter.quantize == "none":
        return merge
    linear = {name for rule in family.rules if is_adaptable(rule) for name in map(leaf, rule.parts)}

    def merge_rounded(name: str, first: int, rows: Tensor) -> Tensor:
        return merge(name, first, rounded(rows) if leaf(name) in linear else rows)

    return merge_rounded


def merger(adapter: Adapter, matrices: dict[str, Tensor], rounding: Rounding | None) -> Change:
    """A function that replaces rows of a base weight, by its Hugging Face name and first row, with merged ones.

    W + scale · B · A is summed in float32 (float64 for float32 weights), then rounded once to the weight's dtype.

    Args:
        matrices: A and B of every layer, by their PEFT names
        rounding: totals to update
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


def merge_all(family: Family, adapter: Adapter, weights: Iterable[Named], merge: Change) -> Iterator[Named]:
    """A whole model's merged weights; with those of an output layer that the adapter separates from the embedding."""
    for name, weight in weights:
        if name == family.embedding_name and splits_tied(family, adapter):
            yield OUTPUT, merge(OUTPUT, 0, weight)
        if name != OUTPUT or not splits_tied(family, adapter):
            yield name, merge(name, 0, weight)


def merged_config(family: Family, adapter: Adapter) -> PretrainedConfig:
    """The text model's configuration after merging."""
    config = family.config
    if splits_tied(family, adapter):
        config = copy.deepcopy(config)
        config.tie_word_embeddings = False
    return config

"""Weights of every rank, tensor by tensor, as Megatron-Core shards them; uses conversion's weight rules."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from mpo_megatron.config import ParallelConfig
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import Adapter, adapter_rules
from mpo_megatron.families.rules import Rule

PARAMETER_ALIGNMENT = 64
"""Elements: alignment of a parameter's start in Megatron's buffers (param_and_grad_buffer.py: _pad_start_of_param_if_needed)."""
BUFFER_ALIGNMENT = 128
"""Elements: a buffer's end is a multiple of this and of the ranks that share it (_pad_end_of_bucket_if_needed)."""


class Weight(NamedTuple):
    """Parameters of one kind on one rank: the same weight of several layers and experts."""

    name: str
    """Its key in a Megatron checkpoint."""
    size: int
    """Elements of each one."""
    matrix: bool
    """Whether it is a layer's matrix, which FP8 quantizes."""
    expert: bool
    """Whether it belongs to an expert, and is shared with other ranks than dense weights."""
    copies: int = 1
    """Number of them."""

    @property
    def total(self) -> int:
        """Elements of all of them."""
        return self.size * self.copies


@dataclass(frozen=True, kw_only=True)
class Part:
    """One virtual stage of a pipeline stage: the layers in one of Megatron's model parts."""

    layers: range
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the output layer."""


def stage_parts(family: Family, parallel: ParallelConfig) -> tuple[tuple[Part, ...], ...]:
    """The layers of every `[stage][virtual stage]`, in Megatron's order."""
    stages, runs = parallel.pipeline, parallel.virtual_pipeline
    counts = parallel.stage_layers(family.num_hidden_layers)
    parts: list[list[Part]] = [[] for _ in range(stages)]
    start = 0
    for run in range(runs):
        for stage in range(stages):
            size = counts[stage] // runs
            first, last = run == stage == 0, run == runs - 1 and stage == stages - 1
            parts[stage].append(Part(layers=range(start, start + size), first=first, last=last))
            start += size
    return tuple(tuple(own) for own in parts)


def part_weights(family: Family, parallel: ParallelConfig, part: Part, padded_vocab: int) -> list[Weight]:
    """The parameters that one rank holds of a part of the model, by the weight rules."""
    weights = []
    per_layer = [rule for rule in family.rules if rule.per_layer]
    first = family.rules.index(per_layer[0])
    for number, rule in enumerate(family.rules):
        if not rule.per_layer and (part.first if number < first else part.last):
            weights.append(_weight(rule, parallel, padded_vocab))
    if part.last and not part.first and family.tie_word_embeddings:
        weights.append(_weight(family.rules[0], parallel, padded_vocab)._replace(name="output_layer.weight"))
    return weights + _layer_weights(per_layer, parallel, part, padded_vocab)


def adapter_weights(family: Family, adapter: Adapter, parallel: ParallelConfig, part: Part, padded_vocab: int) -> list[Weight]:
    """The matrices of an adapter that one rank holds of a part of the model."""
    rules = adapter_rules(family, adapter)
    weights = _layer_weights([rule for rule in rules if rule.per_layer], parallel, part, padded_vocab)
    if part.last:
        weights += [_weight(rule, parallel, padded_vocab) for rule in rules if not rule.per_layer]
    return [weight._replace(matrix=False) for weight in weights]


def _layer_weights(rules: Iterable[Rule], parallel: ParallelConfig, part: Part, padded_vocab: int) -> list[Weight]:
    weights = []
    for rule in rules:
        layers = len(part.layers) if rule.layers is None else len(rule.layers.intersection(part.layers))
        experts = (rule.experts or parallel.expert) // parallel.expert
        if layers:
            weights.append(_weight(rule, parallel, padded_vocab)._replace(copies=layers * experts))
    return weights


def _weight(rule: Rule, parallel: ParallelConfig, padded_vocab: int) -> Weight:
    """One rank's shard of a Megatron tensor of one layer, or of one expert."""
    expert = rule.experts is not None
    ranks = 1 if rule.shard is None else parallel.expert_tensor if expert else parallel.tensor
    size = (padded_vocab if rule.padded else rule.rows) * math.prod(rule.row_shape) // ranks
    return Weight(rule.megatron, size, rule.linear, expert)


def count_parameters(family: Family) -> int:
    """Parameters of the whole model, each counted once, without vocabulary padding."""
    part = Part(layers=range(family.num_hidden_layers), first=True, last=True)
    return sum(weight.total for weight in part_weights(family, ParallelConfig(), part, family.vocab_size))


def buffer_size(weights: list[Weight], num_sharing: int) -> int:
    """Elements of Megatron's buffer for these parameters; `num_sharing` ranks shard its optimizer states.

    Overlapped communication uses several buckets, each padded at its end: less than 1 in 10,000 further elements.
    """
    used = sum(math.ceil(weight.size / PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT * weight.copies for weight in weights)
    multiple = math.lcm(num_sharing, BUFFER_ALIGNMENT)
    return math.ceil(used / multiple) * multiple

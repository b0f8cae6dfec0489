"""Weights of every rank, tensor by tensor, as Megatron-Core cuts them.

Legend: H hidden, F MLP channels, A·D query channels, Q·D key/value channels, V vocabulary rows; each over tensor-parallel ranks.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import NamedTuple

from transformers import PretrainedConfig

from mpo_megatron.config import ParallelConfig
from mpo_megatron.hf.config import head_dim
from mpo_megatron.hf.experts import Experts, read_experts

PARAMETER_ALIGNMENT = 64
"""Elements: where a parameter may begin in Megatron's buffers (param_and_grad_buffer.py: _pad_start_of_param_if_needed)."""
BUFFER_ALIGNMENT = 128
"""Elements: the end of a buffer is a multiple of this and of the ranks that share it (_pad_end_of_bucket_if_needed)."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model that memory and work depend on."""

    hf: PretrainedConfig

    @property
    def layers(self) -> int:
        """Number of layers."""
        return int(self.hf.num_hidden_layers)

    @property
    def hidden(self) -> int:
        """H."""
        return int(self.hf.hidden_size)

    @property
    def head(self) -> int:
        """D: channels of one head."""
        return head_dim(self.hf)

    @property
    def queries(self) -> int:
        """A·D."""
        return int(self.hf.num_attention_heads) * self.head

    @property
    def keys(self) -> int:
        """Q·D: channels of all keys, and of all values."""
        return int(self.hf.num_key_value_heads) * self.head

    @property
    def ffn(self) -> int:
        """F of a dense layer."""
        return int(self.hf.intermediate_size)

    @property
    def tied(self) -> bool:
        """Whether the output layer's weight is the embedding's."""
        return bool(self.hf.tie_word_embeddings)

    @property
    def qk_norm(self) -> bool:
        """Whether queries and keys are normalized."""
        return str(self.hf.model_type).startswith("qwen3")

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have a bias."""
        return str(self.hf.model_type).startswith("qwen2")

    @functools.cached_property
    def _experts(self) -> Experts | None:
        return read_experts(self.hf)

    @property
    def experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return self._experts.num if self._experts else 0

    @property
    def active_experts(self) -> int:
        """Experts that a token goes through."""
        return self._experts.per_token if self._experts else 0

    @property
    def expert_ffn(self) -> int:
        """F of an expert."""
        return self._experts.channels if self._experts else 0

    @property
    def shared_ffn(self) -> int:
        """F of the expert that all tokens go through; 0 if there is none."""
        return (self._experts.shared_channels or 0) if self._experts else 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP consists of experts."""
        return self._experts is not None and self._experts.layers[layer]


class Weight(NamedTuple):
    """One parameter on one rank."""

    name: str
    size: int
    """Elements."""
    matrix: bool
    """Whether it is a matrix of a layer, which FP8 would hold."""
    expert: bool
    """Whether it is an expert's, and shared with other ranks than the rest."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """One of the runs of layers of a pipeline stage: what one of Megatron's model parts holds."""

    layers: range
    first: bool
    """Holds the embedding."""
    last: bool
    """Holds the output layer."""


def stage_parts(shape: Shape, parallel: ParallelConfig) -> tuple[tuple[Part, ...], ...]:
    """[stage][run] the layers of every stage, in the order in which Megatron deals them."""
    stages, runs = parallel.pipeline, parallel.virtual_pipeline
    counts = parallel.stage_layers(shape.layers)
    parts: list[list[Part]] = [[] for _ in range(stages)]
    start = 0
    for run in range(runs):
        for stage in range(stages):
            size = counts[stage] // runs
            first, last = run == stage == 0, run == runs - 1 and stage == stages - 1
            parts[stage].append(Part(layers=range(start, start + size), first=first, last=last))
            start += size
    return tuple(tuple(own) for own in parts)


def part_weights(shape: Shape, parallel: ParallelConfig, part: Part, padded_vocab: int) -> list[Weight]:
    """The parameters that one rank holds of a part of the model."""
    weights = []
    vocabulary = padded_vocab // parallel.tensor * shape.hidden
    if part.first:
        weights.append(Weight("embedding", vocabulary, False, False))
    for layer in part.layers:
        weights += _layer_weights(shape, parallel, shape.has_experts(layer))
    if part.last:
        weights.append(Weight("final norm", shape.hidden, False, False))
        if not (shape.tied and part.first):
            weights.append(Weight("output layer", vocabulary, False, False))
    return weights


def _layer_weights(shape: Shape, parallel: ParallelConfig, experts: bool) -> list[Weight]:
    tensor, hidden = parallel.tensor, shape.hidden
    queries, keys = shape.queries // tensor, shape.keys // tensor
    weights = [
        Weight("norm", hidden, False, False),
        Weight("queries, keys, values", (queries + 2 * keys) * hidden, True, False),
        Weight("attention output", queries * hidden, True, False),
        Weight("norm", hidden, False, False),
    ]
    if shape.qkv_bias:
        weights.append(Weight("bias of queries, keys, values", queries + 2 * keys, False, False))
    if shape.qk_norm:
        weights += [Weight("norm of queries or keys", shape.head, False, False)] * 2
    if not experts:
        ffn = shape.ffn // tensor
        return [*weights, Weight("MLP in", 2 * ffn * hidden, True, False), Weight("MLP out", ffn * hidden, True, False)]
    weights.append(Weight("router", shape.experts * hidden, False, False))
    if shape.shared_ffn:
        ffn = shape.shared_ffn // tensor
        weights += [
            Weight("shared expert in", 2 * ffn * hidden, True, False),
            Weight("shared expert out", ffn * hidden, True, False),
            Weight("shared expert's gate", hidden, False, False),
        ]
    ffn = shape.expert_ffn // parallel.expert_tensor
    own = [Weight("expert in", 2 * ffn * hidden, True, True), Weight("expert out", ffn * hidden, True, True)]
    return weights + own * (shape.experts // parallel.expert)


def count_parameters(shape: Shape) -> int:
    """Parameters of the whole model, each once, without padding of the vocabulary."""
    part = Part(layers=range(shape.layers), first=True, last=True)
    return sum(weight.size for weight in part_weights(shape, ParallelConfig(), part, int(shape.hf.vocab_size)))


def buffer_size(weights: list[Weight], num_sharing: int) -> int:
    """Elements of the buffer in which Megatron lays these parameters out; `num_sharing` ranks share its optimizer states.

    With overlapped communication there are several buckets, whose ends are padded, too: less than 1 in 10,000 elements more.
    """
    used = sum(math.ceil(weight.size / PARAMETER_ALIGNMENT) * PARAMETER_ALIGNMENT for weight in weights)
    multiple = math.lcm(num_sharing, BUFFER_ALIGNMENT)
    return math.ceil(used / multiple) * multiple

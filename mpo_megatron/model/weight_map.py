"""Location of every Hugging Face weight in a Megatron checkpoint: a family's rules, expanded for every layer and expert.

Both directions read the same table, without code per rule. Tests compare it with the models of Megatron-Core and transformers.
Layers, and a layer's experts, are stacked on separate axes. If layers differ in kind, some with experts and some without, each
layer has its own keys instead.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mpo_megatron.families import Family
from mpo_megatron.families.adapters import Adapter, adapter_rules
from mpo_megatron.families.rules import Rule

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class RowRun:
    """Rows that are consecutive on both sides."""

    hf_row: int
    megatron_row: int
    num_rows: int


@dataclass(frozen=True)
class Placement:
    """One whole Hugging Face tensor, and the location of its rows in its `Slice`."""

    name: str
    shape: tuple[int, ...]
    runs: tuple[RowRun, ...]
    """In the order of this tensor's rows."""

    def gather(self, whole: Tensor) -> Tensor:
        """Extract this tensor from the Megatron tensor that holds its rows."""
        tensor = whole.new_empty(self.shape)
        for run in self.runs:
            tensor[run.hf_row : run.hf_row + run.num_rows] = whole[run.megatron_row : run.megatron_row + run.num_rows]
        return tensor

    def scatter(self, tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
        """A Megatron tensor of this shape with the rows of `tensor` in place; other rows are zero."""
        whole = tensor.new_zeros(shape)
        for run in self.runs:
            whole[run.megatron_row : run.megatron_row + run.num_rows] = tensor[run.hf_row : run.hf_row + run.num_rows]
        return whole


@dataclass(frozen=True)
class Slice:
    """One Megatron tensor without its axes for layers and experts, and the Hugging Face tensors that fill it."""

    key: str
    index: tuple[int, ...]
    """Index on the checkpoint tensor's axes for layers and experts, if any."""
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    """Shape in the checkpoint, including axes for layers and experts."""
    placements: tuple[Placement, ...]


EXTRA_STATE_MODULES = (
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.self_attention.linear_proj.post_layernorm",
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.q_layernorm",
    "decoder.layers.self_attention.k_layernorm",
    "decoder.layers.pre_mlp_layernorm",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
    "decoder.layers.mlp.linear_fc2.post_layernorm",
    "decoder.layers.mlp.shared_experts.linear_fc1",
    "decoder.layers.mlp.shared_experts.linear_fc2",
    "decoder.final_layernorm",
)
"""Modules for which some layer implementation expects an FP8 `_extra_state` in the checkpoint. A converted checkpoint holds an
empty one for each: loading ignores unexpected ones, and fails on missing ones."""

DELTA_NET_STATE_MODULES = ("decoder.layers.self_attention.in_proj", "decoder.layers.self_attention.out_proj")
"""The same, in models that have Gated DeltaNets."""

EXPERT_STATE_MODULES = ("decoder.layers.mlp.experts.experts.linear_fc1", "decoder.layers.mlp.experts.experts.linear_fc2")
"""The same, of which each expert has one."""


def build_weight_map(family: Family, padded_vocab: int) -> list[Slice]:
    """Every Megatron tensor of the model, layer by layer, in writing order of both directions."""
    per_layer = [rule for rule in family.rules if rule.per_layer]
    first = family.rules.index(per_layer[0])
    return [
        *(_slice(rule, padded_vocab) for rule in family.rules[:first]),
        *_layer_slices(per_layer, family),
        *(_slice(rule, padded_vocab) for rule in family.rules[first:] if not rule.per_layer),
    ]


def build_adapter_map(family: Family, adapter: Adapter, padded_vocab: int) -> list[Slice]:
    """Every Megatron tensor of an adapter, layer by layer; its parts have PEFT names."""
    rules = adapter_rules(family, adapter)
    return [
        *_layer_slices([rule for rule in rules if rule.per_layer], family),
        *(_slice(rule, padded_vocab) for rule in rules if not rule.per_layer),
    ]


def _layer_slices(rules: Sequence[Rule], family: Family) -> list[Slice]:
    return [
        _layer_slice(rule, layer, expert, family)
        for layer in range(family.num_hidden_layers)
        for rule in rules
        if rule.layers is None or layer in rule.layers
        for expert in range(rule.experts or 1)
    ]


def extra_state_keys(family: Family) -> list[str]:
    """Keys of the empty `_extra_state` objects: Megatron-Core's `ShardedObject.unique_key`, one per layer (and expert)."""
    modules: list[tuple[str, int | None]] = [(module, None) for module in EXTRA_STATE_MODULES]
    if family.delta_net is not None:
        modules += [(module, None) for module in DELTA_NET_STATE_MODULES]
    if family.experts is not None:
        modules += [(module, family.num_experts) for module in EXPERT_STATE_MODULES]
    keys = []
    for module, number in modules:
        for layer in range(family.num_hidden_layers if module.startswith("decoder.layers.") else 1):
            for expert in range(number or 1):
                key, index, sizes = _stacked(module, layer, family)
                if number is not None:
                    index, sizes = (*index, expert), (*sizes, number)
                offsets, shape = (".".join(map(str, part)) for part in (index or (0,), sizes or (1,)))
                keys.append(f"{key}._extra_state/shard_{offsets}_{shape}")
    return keys


def _stacked(key: str, layer: int, family: Family) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Key of a layer's tensor, its index on the axis for layers, and that axis's size; no axis if layers differ in kind, or for
    tensors outside layers."""
    if key.startswith("decoder.layers.") and family.uniform:
        return key, (layer,), (family.num_hidden_layers,)
    return key.replace("decoder.layers.", f"decoder.layers.{layer}."), (), ()


def _layer_slice(rule: Rule, layer: int, expert: int, family: Family) -> Slice:
    item = _slice(rule, 0, layer=layer, expert=expert)
    key, index, sizes = _stacked(rule.megatron, layer, family)
    if rule.experts is not None:
        index, sizes = (*index, expert), (*sizes, rule.experts)
    return dataclasses.replace(item, key=key, index=index, global_shape=(*sizes, *item.shape))


def _slice(rule: Rule, padded_vocab: int, **names: int) -> Slice:
    """The Megatron tensor of a rule, without axes for layers and experts; `names` fill the Hugging Face names."""
    block_rows = sum(rule.parts.values())
    shape = (padded_vocab if rule.padded else rule.rows, *rule.row_shape)
    runs: dict[str, list[RowRun]] = {name: [] for name in rule.parts}
    start = 0
    for piece in rule.pieces:
        for block in range(rule.blocks):
            runs[piece.name].append(RowRun(piece.start + block * piece.stride, block * block_rows + start, piece.rows))
        start += piece.rows
    placements = tuple(
        Placement(
            name.format(**names),
            (rule.blocks * rows, *rule.row_shape),
            tuple(sorted(runs[name], key=lambda run: run.hf_row)),
        )
        for name, rows in rule.parts.items()
    )
    return Slice(rule.megatron, (), shape, shape, placements)

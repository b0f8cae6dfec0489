"""Where every Hugging Face weight lies in a Megatron checkpoint: one table of rules, read in both directions.

Both sides store a matrix as rows, and conversion only ever moves whole rows: Megatron stacks gate on up, and
interleaves q, k and v by query group. So a rule says which rows of which Hugging Face tensors make up one Megatron
tensor, and no rule needs code for either direction. The tests hold the table against the models of Megatron-Core and
transformers. Layers, and a layer's experts, are stacked on axes of their own; where layers differ in kind, some with experts
and some without, each has keys of its own instead.

A new architecture is a new function like `qwen_rules` and an entry in `RULES`; see docs/conversion.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpo_megatron.config import ConfigError
from mpo_megatron.hf.config import head_dim
from mpo_megatron.hf.experts import read_experts

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor (of one layer, and of one expert, if its parts name a `{layer}` or `{expert}`), as rows of Hugging Face
    tensors."""

    megatron: str
    """Key in the Megatron checkpoint. Layers and experts share a key: Megatron stacks them on first axes."""
    parts: dict[str, int]
    """Hugging Face name → rows that it gives to each block, in Megatron's order."""
    columns: int | None = None
    """Row length; None for a vector, whose rows are its elements."""
    blocks: int = 1
    """How often the parts repeat: a block is [part 1's rows, part 2's rows, …]."""
    padded_rows: int | None = None
    """Rows of the Megatron tensor if more than the parts give; those beyond are zero."""
    experts: int | None = None
    """Number of experts that have one."""
    layers: frozenset[int] | None = None
    """Layers that have one; None: all."""

    @property
    def per_layer(self) -> bool:
        """Whether every layer has one."""
        return all("{layer}" in name for name in self.parts)


@dataclass(frozen=True)
class Run:
    """Consecutive rows that are consecutive on both sides."""

    hf_row: int
    megatron_row: int
    num_rows: int


@dataclass(frozen=True)
class Placement:
    """One whole Hugging Face tensor, and where its rows lie in the `Slice` it belongs to."""

    name: str
    shape: tuple[int, ...]
    runs: tuple[Run, ...]


@dataclass(frozen=True)
class Slice:
    """One Megatron tensor without its axes for layers and experts, and the Hugging Face tensors that fill it."""

    key: str
    index: tuple[int, ...]
    """Index on the checkpoint tensor's axes for layers and experts, if it has any."""
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    """Shape in the checkpoint, axes for layers and experts included."""
    placements: tuple[Placement, ...]


def qwen_rules(hf_config: Any, padded_vocab: int) -> list[Rule]:
    """Qwen2 / Qwen2.5 (bias on q, k, v) and Qwen3 (norms on q and k), dense or with experts."""
    hidden, vocab = hf_config.hidden_size, hf_config.vocab_size
    heads, groups, channels = hf_config.num_attention_heads, hf_config.num_key_value_heads, head_dim(hf_config)
    layer = "model.layers.{layer}."
    attention = layer + "self_attn."
    # Megatron: [query heads of group 0, its key head, its value head, query heads of group 1, …]
    query_rows = heads // groups * channels

    def qkv(kind: str) -> dict[str, int]:
        rows = {"q": query_rows, "k": channels, "v": channels}
        return {f"{attention}{name}_proj.{kind}": number for name, number in rows.items()}

    rules = [
        Rule("embedding.word_embeddings.weight", {EMBEDDING: vocab}, hidden, padded_rows=padded_vocab),
        Rule("decoder.layers.self_attention.linear_qkv.layer_norm_weight", {layer + "input_layernorm.weight": hidden}),
        Rule("decoder.layers.self_attention.linear_qkv.weight", qkv("weight"), hidden, blocks=groups),
    ]
    if hf_config.model_type.startswith("qwen2"):
        rules.append(Rule("decoder.layers.self_attention.linear_qkv.bias", qkv("bias"), blocks=groups))
    if hf_config.model_type.startswith("qwen3"):
        for norm in "q", "k":
            rules.append(
                Rule(
                    f"decoder.layers.self_attention.{norm}_layernorm.weight",
                    {f"{attention}{norm}_norm.weight": channels},
                )
            )
    rules += [
        Rule("decoder.layers.self_attention.linear_proj.weight", {attention + "o_proj.weight": hidden}, heads * channels),
        *_mlp_rules(hf_config),
        Rule("decoder.final_layernorm.weight", {"model.norm.weight": hidden}),
    ]
    if not hf_config.tie_word_embeddings:
        rules.append(Rule("output_layer.weight", {OUTPUT: vocab}, hidden, padded_rows=padded_vocab))
    return rules


def _mlp_rules(hf_config: Any) -> list[Rule]:
    """The norm before the MLP and the MLP itself: dense, or a router, its experts and a shared one."""
    hidden, experts = hf_config.hidden_size, read_experts(hf_config)
    mlp, norm = "model.layers.{layer}.mlp.", {"model.layers.{layer}.post_attention_layernorm.weight": hidden}

    def gated(megatron: str, hf: str, ffn: int, **where: Any) -> list[Rule]:
        """Gate and up, stacked, and down."""
        return [
            Rule(f"{megatron}linear_fc1.weight", {f"{hf}gate_proj.weight": ffn, f"{hf}up_proj.weight": ffn}, hidden, **where),
            Rule(f"{megatron}linear_fc2.weight", {f"{hf}down_proj.weight": hidden}, ffn, **where),
        ]

    sparse = frozenset(layer for layer, is_sparse in enumerate(experts.layers) if is_sparse) if experts else frozenset()
    rules = []
    if experts is None or not experts.everywhere:
        dense = frozenset(range(hf_config.num_hidden_layers)) - sparse
        rules += [
            Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", norm, layers=dense),
            *gated("decoder.layers.mlp.", mlp, hf_config.intermediate_size, layers=dense),
        ]
    if experts is not None:
        rules += [
            Rule("decoder.layers.pre_mlp_layernorm.weight", norm, layers=sparse),
            Rule("decoder.layers.mlp.router.weight", {mlp + "gate.weight": experts.num}, hidden, layers=sparse),
            *gated(
                "decoder.layers.mlp.experts.experts.",
                mlp + "experts.{expert}.",
                experts.channels,
                experts=experts.num,
                layers=sparse,
            ),
        ]
        if experts.shared_channels is not None:
            shared = "decoder.layers.mlp.shared_experts."
            rules += [
                *gated(shared, mlp + "shared_expert.", experts.shared_channels, layers=sparse),
                Rule(f"{shared}gate_weight", {mlp + "shared_expert_gate.weight": 1}, hidden, layers=sparse),
            ]
    return rules


RULES: dict[str, Callable[[Any, int], list[Rule]]] = dict.fromkeys(("qwen2", "qwen3", "qwen2_moe", "qwen3_moe"), qwen_rules)
"""`model_type` of config.json → its rules."""

EXTRA_STATE_MODULES = (
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.q_layernorm",
    "decoder.layers.self_attention.k_layernorm",
    "decoder.layers.pre_mlp_layernorm",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
    "decoder.layers.mlp.shared_experts.linear_fc1",
    "decoder.layers.mlp.shared_experts.linear_fc2",
    "decoder.final_layernorm",
)
"""Modules for which some layer implementation asks the checkpoint for an FP8 `_extra_state`. A converted checkpoint
holds an empty one for each: loading ignores the ones it does not ask for, and fails on the ones it misses."""

EXPERT_STATE_MODULES = ("decoder.layers.mlp.experts.experts.linear_fc1", "decoder.layers.mlp.experts.experts.linear_fc2")
"""The same, of which each expert has one."""


def build_weight_map(hf_config: Any, padded_vocab: int) -> list[Slice]:
    """Every Megatron tensor of the model, layer by layer, in the order in which both directions write them.

    Raises:
        ConfigError: no rules for this `model_type`.
    """
    if hf_config.model_type not in RULES:
        raise ConfigError(
            f"model_type = {hf_config.model_type!r} has no conversion rules; there are some for {', '.join(RULES)}."
        )
    rules = RULES[hf_config.model_type](hf_config, padded_vocab)
    per_layer = [rule for rule in rules if rule.per_layer]
    first = rules.index(per_layer[0])
    return [
        *(_slice(rule) for rule in rules[:first]),
        *(
            _layer_slice(rule, layer, expert, hf_config)
            for layer in range(hf_config.num_hidden_layers)
            for rule in per_layer
            if rule.layers is None or layer in rule.layers
            for expert in range(rule.experts or 1)
        ),
        *(_slice(rule) for rule in rules[first:] if not rule.per_layer),
    ]


def extra_state_keys(hf_config: Any) -> list[str]:
    """Keys of the empty `_extra_state` objects: Megatron-Core's `ShardedObject.unique_key`, one per layer (and expert)."""
    experts = read_experts(hf_config)
    modules: list[tuple[str, int | None]] = [(module, None) for module in EXTRA_STATE_MODULES]
    if experts is not None:
        modules += [(module, experts.num) for module in EXPERT_STATE_MODULES]
    keys = []
    for module, number in modules:
        for layer in range(hf_config.num_hidden_layers if module.startswith("decoder.layers.") else 1):
            for expert in range(number or 1):
                key, index, sizes = _stacked(module, layer, hf_config)
                if number is not None:
                    index, sizes = (*index, expert), (*sizes, number)
                offsets, shape = (".".join(map(str, part)) for part in (index or (0,), sizes or (1,)))
                keys.append(f"{key}._extra_state/shard_{offsets}_{shape}")
    return keys


def _stacked(key: str, layer: int, hf_config: Any) -> tuple[str, tuple[int, ...], tuple[int, ...]]:
    """Key of a layer's tensor, its index on the axis for layers, and that axis's size: no axis where layers differ in kind, and
    none for what is in no layer."""
    experts = read_experts(hf_config)
    if key.startswith("decoder.layers.") and (experts is None or experts.everywhere):
        return key, (layer,), (hf_config.num_hidden_layers,)
    return key.replace("decoder.layers.", f"decoder.layers.{layer}."), (), ()


def _layer_slice(rule: Rule, layer: int, expert: int, hf_config: Any) -> Slice:
    item = _slice(rule, layer=layer, expert=expert)
    key, index, sizes = _stacked(rule.megatron, layer, hf_config)
    if rule.experts is not None:
        index, sizes = (*index, expert), (*sizes, rule.experts)
    return dataclasses.replace(item, key=key, index=index, global_shape=(*sizes, *item.shape))


def _slice(rule: Rule, **names: int) -> Slice:
    """The tensor of a rule, without axes for layers and experts; `names` fill the Hugging Face names."""
    block_rows = sum(rule.parts.values())
    row_shape = () if rule.columns is None else (rule.columns,)
    shape = (rule.padded_rows or rule.blocks * block_rows, *row_shape)
    placements = []
    start = 0
    for name, rows in rule.parts.items():
        runs = [Run(block * rows, block * block_rows + start, rows) for block in range(rule.blocks)]
        placements.append(Placement(name.format(**names), (rule.blocks * rows, *row_shape), tuple(runs)))
        start += rows
    return Slice(rule.megatron, (), shape, shape, tuple(placements))

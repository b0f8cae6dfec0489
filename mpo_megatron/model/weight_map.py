"""Where every Hugging Face weight lies in a Megatron checkpoint: one table of rules, read in both directions.

Both sides store a matrix as rows, and conversion only ever moves whole rows: Megatron stacks gate on up, and
interleaves q, k and v by query group. So a rule says which rows of which Hugging Face tensors make up one Megatron
tensor, and no rule needs code for either direction. The tests hold the table against the models of Megatron-Core and
transformers.

A new architecture is a new function like `qwen_rules` and an entry in `RULES`; see docs/conversion.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mpo_megatron.config import ConfigError
from mpo_megatron.model.architecture import head_dim

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"


@dataclass(frozen=True)
class Rule:
    """One Megatron tensor (of one layer, if its parts name a `{layer}`), as rows of Hugging Face tensors."""

    megatron: str
    """Key in the Megatron checkpoint. Layers share a key: Megatron stacks them on a first axis."""
    parts: dict[str, int]
    """Hugging Face name → rows that it gives to each block, in Megatron's order."""
    columns: int | None = None
    """Row length; None for a vector, whose rows are its elements."""
    blocks: int = 1
    """How often the parts repeat: a block is [part 1's rows, part 2's rows, …]."""
    padded_rows: int | None = None
    """Rows of the Megatron tensor if more than the parts give; those beyond are zero."""

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
    """One Megatron tensor without its layer axis, and the Hugging Face tensors that fill it."""

    key: str
    layer: int | None
    """Index on the checkpoint tensor's first axis; None for a tensor without layer axis."""
    shape: tuple[int, ...]
    global_shape: tuple[int, ...]
    """Shape in the checkpoint, layer axis included."""
    placements: tuple[Placement, ...]


def qwen_rules(hf_config: Any, padded_vocab: int) -> list[Rule]:
    """Qwen2 / Qwen2.5 (bias on q, k, v) and Qwen3 dense (norms on q and k)."""
    hidden, ffn, vocab = hf_config.hidden_size, hf_config.intermediate_size, hf_config.vocab_size
    heads, groups, channels = hf_config.num_attention_heads, hf_config.num_key_value_heads, head_dim(hf_config)
    layer = "model.layers.{layer}."
    attention, mlp = layer + "self_attn.", layer + "mlp."
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
    if hf_config.model_type == "qwen2":
        rules.append(Rule("decoder.layers.self_attention.linear_qkv.bias", qkv("bias"), blocks=groups))
    if hf_config.model_type == "qwen3":
        for norm in "q", "k":
            rules.append(
                Rule(
                    f"decoder.layers.self_attention.{norm}_layernorm.weight",
                    {f"{attention}{norm}_norm.weight": channels},
                )
            )
    rules += [
        Rule("decoder.layers.self_attention.linear_proj.weight", {attention + "o_proj.weight": hidden}, heads * channels),
        Rule("decoder.layers.mlp.linear_fc1.layer_norm_weight", {layer + "post_attention_layernorm.weight": hidden}),
        Rule("decoder.layers.mlp.linear_fc1.weight", {mlp + "gate_proj.weight": ffn, mlp + "up_proj.weight": ffn}, hidden),
        Rule("decoder.layers.mlp.linear_fc2.weight", {mlp + "down_proj.weight": hidden}, ffn),
        Rule("decoder.final_layernorm.weight", {"model.norm.weight": hidden}),
    ]
    if not hf_config.tie_word_embeddings:
        rules.append(Rule("output_layer.weight", {OUTPUT: vocab}, hidden, padded_rows=padded_vocab))
    return rules


RULES: dict[str, Callable[[Any, int], list[Rule]]] = {"qwen2": qwen_rules, "qwen3": qwen_rules}
"""`model_type` of config.json → its rules."""

EXTRA_STATE_MODULES = (
    "decoder.layers.self_attention.core_attention",
    "decoder.layers.self_attention.linear_proj",
    "decoder.layers.self_attention.linear_qkv",
    "decoder.layers.self_attention.q_layernorm",
    "decoder.layers.self_attention.k_layernorm",
    "decoder.layers.mlp.linear_fc1",
    "decoder.layers.mlp.linear_fc2",
    "decoder.final_layernorm",
)
"""Modules for which some layer implementation asks the checkpoint for an FP8 `_extra_state`. A converted checkpoint
holds an empty one for each: loading ignores the ones it does not ask for, and fails on the ones it misses."""


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
    num_layers = hf_config.num_hidden_layers
    return [
        *(_slice(rule, None, num_layers) for rule in rules[:first]),
        *(_slice(rule, layer, num_layers) for layer in range(num_layers) for rule in per_layer),
        *(_slice(rule, None, num_layers) for rule in rules[first:] if not rule.per_layer),
    ]


def extra_state_keys(num_layers: int) -> list[str]:
    """Keys of the empty `_extra_state` objects: Megatron-Core's `ShardedObject.unique_key`, one per layer."""
    keys = []
    for module in EXTRA_STATE_MODULES:
        number = num_layers if module.startswith("decoder.layers.") else 1
        keys += [f"{module}._extra_state/shard_{index}_{number}" for index in range(number)]
    return keys


def _slice(rule: Rule, layer: int | None, num_layers: int) -> Slice:
    block_rows = sum(rule.parts.values())
    row_shape = () if rule.columns is None else (rule.columns,)
    shape = (rule.padded_rows or rule.blocks * block_rows, *row_shape)
    placements = []
    start = 0
    for name, rows in rule.parts.items():
        runs = [Run(block * rows, block * block_rows + start, rows) for block in range(rule.blocks)]
        placements.append(Placement(name.format(layer=layer), (rule.blocks * rows, *row_shape), tuple(runs)))
        start += rows
    global_shape = shape if layer is None else (num_layers, *shape)
    return Slice(rule.megatron, layer, shape, global_shape, tuple(placements))

"""Qwen3-Next, Qwen3.5 and Qwen3.6: three Gated DeltaNets, then one layer of attention with a gate on its output, and so on.

All have norms that multiply by 1 + their weight, and rotate part of each head. Qwen3.5 and 3.6 are published as multimodal
models, of which only the text model is read: text has the same position on the three axes of images.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from transformers import PretrainedConfig

from mpo_megatron.config import require
from mpo_megatron.families.family import DeltaNet, Experts, Family
from mpo_megatron.families.fields import (
    DECODER,
    activation,
    check_fields,
    check_others,
    decoder_sizes,
    read_layers,
    read_ropes,
    rule_sizes,
)
from mpo_megatron.families.qwen import EXPERTS, check_experts, mlp_rules, read_experts
from mpo_megatron.families.rules import (
    HF_LAYER,
    LAYER,
    TEXT_MODEL,
    RowPiece,
    Rule,
    Sizes,
    decoder_rules,
    gated_attention_rules,
    norm_rule,
)

PREDICTING_FIELDS = ("mtp_num_hidden_layers", "num_nextn_predict_layers")
"""Names of the number of layers that predict further tokens; engines read the second one in Qwen3-Next."""
FIELDS = DECODER | {
    *("layer_types", "full_attention_interval", "partial_rotary_factor"),
    *("attn_output_gate", "mamba_ssm_dtype", "output_gate_type"),
    *("linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads", "linear_num_value_heads"),
    # for layers that predict further tokens; the language model computes the same without them
    *(*PREDICTING_FIELDS, "mtp_use_dedicated_embeddings"),
}
WHOLE_FIELDS = {
    *("text_config", "vision_config", "tie_word_embeddings"),
    *("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"),
}
"""Fields of a multimodal model; those about images are passed through."""
FIXED = {"attn_output_gate": True, "mamba_ssm_dtype": "float32", "output_gate_type": "swish"}
"""Fields in published files that `transformers` ignores, and the values its models use."""
OTHER_WEIGHTS = ("mtp.", "model.visual.")
"""Prefixes of layers that predict further tokens, and of the vision tower; `transformers` loads the text model without them."""


def read_qwen3_next(config: PretrainedConfig) -> Family:
    """Qwen3-Next, with experts in all or some layers."""
    check_fields(config, FIELDS | EXPERTS)
    return _read(config, read_experts(config, shared=True), joint=True)


def read_qwen3_5(config: PretrainedConfig) -> Family:
    """The text model of Qwen3.5 and 3.6, dense."""
    check_fields(config, FIELDS)
    return _read(config, None, joint=False)


def read_qwen3_5_moe(config: PretrainedConfig) -> Family:
    """The text model of Qwen3.5 and 3.6 with experts in all layers."""
    check_fields(config, FIELDS | EXPERTS)
    for name, value in (("mlp_only_layers", []), ("decoder_sparse_step", 1), ("norm_topk_prob", True)):
        found: object = getattr(config, name, value)
        require(
            found == value,
            f"config.json: {name} = {found!r}; this family has experts in all layers, with normalized probabilities: "
            f"only {value!r} is supported.",
        )
    experts = Experts(
        num=config.num_experts,
        per_token=config.num_experts_per_tok,
        channels=config.moe_intermediate_size,
        shared_channels=config.shared_expert_intermediate_size,
        layers=(True,) * config.num_hidden_layers,
    )
    check_experts(experts)
    return _read(config, experts, joint=False)


def read_text_model(config: PretrainedConfig) -> Family:
    """The text model of a multimodal Qwen3.5 or 3.6."""
    text: Any = config.text_config
    check_others(config, WHOLE_FIELDS)
    require(
        bool(config.tie_word_embeddings) == bool(text.tie_word_embeddings),
        f"config.json: tie_word_embeddings = {config.tie_word_embeddings}, but {text.tie_word_embeddings} in text_config; set "
        "both to match the weights.",
    )
    # By the type of the whole: some files repeat it in text_config, and `transformers` takes the text model's class from it.
    family = {"qwen3_5": read_qwen3_5, "qwen3_5_moe": read_qwen3_5_moe}[config.model_type](text)
    return dataclasses.replace(family, whole_config=config, rules=tuple(_within(rule) for rule in family.rules))


def _within(rule: Rule) -> Rule:
    """The same rule with the weights' names in a multimodal model."""

    def rename(name: str) -> str:
        return TEXT_MODEL + name.removeprefix("model.") if name.startswith("model.") else name

    return dataclasses.replace(
        rule,
        parts={rename(name): rows for name, rows in rule.parts.items()},
        order=tuple(dataclasses.replace(piece, name=rename(piece.name)) for piece in rule.order),
    )


def _read(config: PretrainedConfig, experts: Experts | None, *, joint: bool) -> Family:
    """Features of any of these models.

    Args:
        joint: a Gated DeltaNet's inputs are two projections, ordered by heads, instead of four
    """
    for name, value in FIXED.items():
        found: object = getattr(config, name, None)
        require(
            found in (None, value),
            f"config.json: {name} = {found!r}; transformers always computes with {value!r}; set the field to that.",
        )
    delta_net = _read_delta_net(config)
    kinds = ["full_attention" if kind == "linear_attention" else kind for kind in config.layer_types]
    return Family(
        **decoder_sizes(config),
        activation=activation(config),
        norm_offset=True,
        qk_norm="head",
        output_gate=True,
        ropes=read_ropes(config, partial=True),
        attention=read_layers(config, kinds),
        delta_net=delta_net,
        experts=experts,
        rules=_rules(config, delta_net, experts, joint=joint),
        other_weights=OTHER_WEIGHTS,
        predicting_layers=_read_predicting_layers(config),
    )


def _read_predicting_layers(config: PretrainedConfig) -> int:
    """Number of layers that predict further tokens."""
    found = {name: getattr(config, name, None) or 0 for name in PREDICTING_FIELDS}
    for name, value in found.items():
        require(
            type(value) is int and 0 <= value <= 100,
            f"config.json: {name} = {value!r}; no model has this value; check or copy the file again.",
        )
    return max(found.values())


def _read_delta_net(config: PretrainedConfig) -> DeltaNet:
    found = DeltaNet(
        key_heads=config.linear_num_key_heads,
        value_heads=config.linear_num_value_heads,
        key_channels=config.linear_key_head_dim,
        value_channels=config.linear_value_head_dim,
        taps=config.linear_conv_kernel_dim,
        layers=tuple(kind == "linear_attention" for kind in config.layer_types),
    )
    for name in sorted(name for name in FIELDS if name.startswith("linear_")):
        value = getattr(config, name)
        require(0 < value <= 10**5, f"config.json: {name} = {value}; no model has this value; check or copy the file again.")
    require(
        found.value_heads % found.key_heads == 0,
        f"config.json: linear_num_key_heads = {found.key_heads} does not divide linear_num_value_heads = {found.value_heads}; "
        "check or copy the file again.",
    )
    require(
        config.hidden_act == "silu",
        f"config.json: hidden_act = {config.hidden_act!r}; with layers of linear_attention, only silu is supported.",
    )
    return found


def _rules(config: PretrainedConfig, delta_net: DeltaNet, experts: Experts | None, *, joint: bool) -> tuple[Rule, ...]:
    sizes = rule_sizes(config)
    recurrent = frozenset(layer for layer, is_recurrent in enumerate(delta_net.layers) if is_recurrent)
    attending = frozenset(range(config.num_hidden_layers)) - recurrent
    layers = [*_delta_net_rules(sizes, delta_net, recurrent, joint=joint), *gated_attention_rules(sizes, attending)]
    return decoder_rules(sizes, [*layers, *mlp_rules(config, experts)])


def _delta_net_rules(sizes: Sizes, net: DeltaNet, layers: frozenset[int], *, joint: bool) -> list[Rule]:
    """The rules of an input norm and a Gated DeltaNet.

    Megatron's side stores the rows [queries, keys, values, gates, β, α] of each key head, head by head, so that ranks can shard
    whole heads.
    """
    key, prefix = LAYER + "self_attention.", HF_LAYER + "linear_attn."
    share = net.value_heads // net.key_heads
    queries, values, heads = net.key_channels, share * net.value_channels, net.key_heads
    order: tuple[RowPiece, ...] = ()
    if joint:
        parts = {prefix + "in_proj_qkvz.weight": 2 * queries + 2 * values, prefix + "in_proj_ba.weight": 2 * share}
    else:
        mixed, gates, beta, alpha = (f"{prefix}in_proj_{name}.weight" for name in ("qkv", "z", "b", "a"))
        parts = {mixed: 2 * queries + values, gates: values, beta: share, alpha: share}
        order = (
            *_convolved(mixed, net),
            *(RowPiece(name, 0, rows, rows) for name, rows in parts.items() if name != mixed),
        )
    convolution = prefix + "conv1d.weight"
    rules = [
        norm_rule("self_attention.in_proj.layer_norm_weight", "input_layernorm.weight", sizes.hidden),
        Rule(key + "in_proj.weight", parts, sizes.hidden, blocks=heads, order=order, shard="rows"),
        Rule(
            key + "conv1d.weight",
            {convolution: 2 * queries + values},
            (1, net.taps),
            blocks=heads,
            order=_convolved(convolution, net),
            shard="rows",
        ),
        *(Rule(key + name, {prefix + name: share}, blocks=heads, shard="rows") for name in ("A_log", "dt_bias")),
        Rule(key + "out_norm.weight", {prefix + "norm.weight": net.value_channels}),
        Rule(key + "out_proj.weight", {prefix + "out_proj.weight": sizes.hidden}, net.values, shard="columns"),
    ]
    return [dataclasses.replace(rule, layers=layers) for rule in rules]


def _convolved(name: str, net: DeltaNet) -> tuple[RowPiece, ...]:
    """A key head's rows of a tensor that stores all queries, then all keys, then all values."""
    channels, values = net.key_channels, net.values // net.key_heads
    return (
        RowPiece(name, 0, channels, channels),
        RowPiece(name, net.keys, channels, channels),
        RowPiece(name, 2 * net.keys, values, values),
    )

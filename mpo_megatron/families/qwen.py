"""Qwen2 and Qwen2.5 (bias on queries, keys and values), Qwen3 (norm per query and key head), and both with experts."""

from __future__ import annotations

from transformers import PretrainedConfig

from mpo_megatron.config import require
from mpo_megatron.families.family import Experts, Family
from mpo_megatron.families.fields import (
    DECODER,
    activation,
    check_fields,
    decoder_sizes,
    read_layers,
    read_ropes,
    rule_sizes,
)
from mpo_megatron.families.rules import (
    HF_LAYER,
    LAYER,
    Rule,
    decoder_rules,
    gated_rules,
    mlp_names,
    norm_rule,
    normed_attention_rules,
    router_rule,
)

ATTENTION = {"use_sliding_window", "sliding_window", "max_window_layers", "layer_types"}
EXPERTS = {
    *("decoder_sparse_step", "mlp_only_layers", "num_experts", "num_local_experts", "num_experts_per_tok", "norm_topk_prob"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
}


def read_qwen2(config: PretrainedConfig) -> Family:
    """Qwen2 and Qwen2.5, dense."""
    return _read(config, ATTENTION, qkv_bias=True)


def read_qwen3(config: PretrainedConfig) -> Family:
    """Qwen3, dense."""
    return _read(config, ATTENTION, qkv_bias=False)


def read_qwen2_moe(config: PretrainedConfig) -> Family:
    """Qwen1.5 and Qwen2 with experts and a shared expert."""
    return _read(config, ATTENTION | EXPERTS, qkv_bias=True, experts=read_experts(config, shared=True))


def read_qwen3_moe(config: PretrainedConfig) -> Family:
    """Qwen3 with experts."""
    return _read(config, ATTENTION | EXPERTS, qkv_bias=False, experts=read_experts(config, shared=False))


def _read(config: PretrainedConfig, fields: set[str], *, qkv_bias: bool, experts: Experts | None = None) -> Family:
    check_fields(config, DECODER | fields)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        windowed = bool(config.use_sliding_window and config.sliding_window)
        kinds = ["sliding_attention" if windowed else "full_attention"] * config.num_hidden_layers
    return Family(
        **decoder_sizes(config),
        activation=activation(config),
        qkv_bias=qkv_bias,
        qk_norm=None if qkv_bias else "head",
        ropes=read_ropes(config),
        attention=read_layers(config, kinds),
        experts=experts,
        rules=_rules(config, experts, qkv_bias=qkv_bias),
    )


def read_experts(config: PretrainedConfig, *, shared: bool) -> Experts:
    """The experts described by a config, and the layers that have them.

    Raises:
        ConfigError: impossible numbers, or a model without experts.
    """
    dense, every = set(config.mlp_only_layers or ()), config.decoder_sparse_step
    require(every >= 1, f"config.json: decoder_sparse_step = {every}; it must be 1 or more; check or copy the file again.")
    experts = Experts(
        num=config.num_experts,
        per_token=config.num_experts_per_tok,
        channels=config.moe_intermediate_size,
        shared_channels=config.shared_expert_intermediate_size if shared else None,
        normalized=config.norm_topk_prob,
        layers=tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(config.num_hidden_layers)),
    )
    kind = config.model_type.replace("_moe", "")
    require(
        experts.num >= 1 and any(experts.layers),
        f"config.json: num_experts = {experts.num}, decoder_sparse_step = {every}, mlp_only_layers = "
        f"{config.mlp_only_layers}: no layer has experts; "
        + ("copy the file again." if kind == config.model_type else f"for a dense model, set model_type to {kind}."),
    )
    check_experts(experts)
    return experts


def check_experts(experts: Experts) -> None:
    """Refuse impossible numbers of experts.

    Raises:
        ConfigError: names the field of config.json.
    """
    require(
        1 <= experts.per_token <= experts.num,
        f"config.json: num_experts_per_tok = {experts.per_token} of num_experts = {experts.num}; check or copy "
        "config.json again.",
    )
    require(
        experts.per_token > 1 or not experts.normalized,
        "config.json: num_experts_per_tok = 1 with norm_topk_prob = true: the only probability is always 1, so the router cannot "
        "learn, and Megatron-Core refuses it.",
    )


def _rules(config: PretrainedConfig, experts: Experts | None, *, qkv_bias: bool) -> tuple[Rule, ...]:
    sizes = rule_sizes(config)
    attention = normed_attention_rules(sizes, qkv_bias=qkv_bias, qk_norm=not qkv_bias)
    return decoder_rules(sizes, [*attention, *mlp_rules(config, experts)])


def mlp_rules(config: PretrainedConfig, experts: Experts | None) -> list[Rule]:
    """The norm before the MLP and the MLP: dense, or a router with experts and a shared expert."""
    hidden, norm = config.hidden_size, "post_attention_layernorm.weight"
    sparse = frozenset(layer for layer, is_sparse in enumerate(experts.layers) if is_sparse) if experts else frozenset()
    rules = []
    if experts is None or not experts.everywhere:
        dense = frozenset(range(config.num_hidden_layers)) - sparse
        rules += [
            norm_rule("mlp.linear_fc1.layer_norm_weight", norm, hidden, dense),
            *gated_rules("mlp.", mlp_names("mlp."), hidden, config.intermediate_size, layers=dense),
        ]
    if experts is None:
        return rules
    rules += [
        norm_rule("pre_mlp_layernorm.weight", norm, hidden, sparse),
        router_rule("mlp.gate.weight", experts.num, hidden, sparse),
        *gated_rules(
            "mlp.experts.experts.",
            mlp_names("mlp.experts.{expert}."),
            *(hidden, experts.channels),
            layers=sparse,
            experts=experts.num,
        ),
    ]
    if experts.shared_channels is not None:
        gate = {f"{HF_LAYER}mlp.shared_expert_gate.weight": 1}
        rules += [
            *gated_rules("mlp.shared_experts.", mlp_names("mlp.shared_expert."), hidden, experts.shared_channels, layers=sparse),
            Rule(f"{LAYER}mlp.shared_experts.gate_weight", gate, hidden, layers=sparse),
        ]
    return rules

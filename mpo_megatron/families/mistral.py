"""Mistral 7B v0.1 to v0.3 and Mistral-Small (Llama with a sliding window), and Mixtral (Mistral with experts)."""

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
    Rule,
    decoder_rules,
    gated_rules,
    llama_rules,
    norm_rule,
    normed_attention_rules,
    router_rule,
)


def read_mistral(config: PretrainedConfig) -> Family:
    """Mistral: all layers have the window, if set."""
    check_fields(config, DECODER | {"sliding_window"})
    return Family(
        **decoder_sizes(config),
        activation=activation(config),
        ropes=read_ropes(config),
        attention=read_layers(config, _kinds(config)),
        rules=llama_rules(rule_sizes(config)),
    )


def read_mixtral(config: PretrainedConfig) -> Family:
    """Mixtral: experts in every layer, with probabilities normalized over a token's experts."""
    check_fields(config, DECODER | {"sliding_window", "num_local_experts", "num_experts_per_tok"})
    experts = Experts(
        num=config.num_local_experts,
        per_token=config.num_experts_per_tok,
        channels=config.intermediate_size,
        layers=(True,) * config.num_hidden_layers,
        size_field="intermediate_size",
    )
    require(
        2 <= experts.per_token <= experts.num,
        f"config.json: num_experts_per_tok = {experts.per_token} of num_local_experts = {experts.num}; it must be 2 or more, "
        "because with one expert the normalized probability is always 1 and the router cannot learn.",
    )
    return Family(
        **decoder_sizes(config),
        activation=activation(config),
        ropes=read_ropes(config),
        attention=read_layers(config, _kinds(config)),
        experts=experts,
        rules=_mixtral_rules(config, experts),
    )


def _kinds(config: PretrainedConfig) -> list[str]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def _mixtral_rules(config: PretrainedConfig, experts: Experts) -> tuple[Rule, ...]:
    sizes = rule_sizes(config)
    names = [f"block_sparse_moe.experts.{{expert}}.{name}.weight" for name in ("w1", "w3", "w2")]  # gate, up, down
    return decoder_rules(
        sizes,
        [
            *normed_attention_rules(sizes),
            norm_rule("pre_mlp_layernorm.weight", "post_attention_layernorm.weight", sizes.hidden),
            router_rule("block_sparse_moe.gate.weight", experts.num, sizes.hidden),
            *gated_rules("mlp.experts.experts.", names, sizes.hidden, experts.channels, experts=experts.num),
        ],
    )

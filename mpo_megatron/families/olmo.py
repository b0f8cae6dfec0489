"""OLMo 2 and 3: norms only on the output of attention and MLP, queries and keys normalized over all heads together.

Three of four layers of OLMo 3 have a window, and only the others' rotary embedding is scaled.
"""

from __future__ import annotations

from transformers import PretrainedConfig

from mpo_megatron.families.family import Family
from mpo_megatron.families.fields import (
    DECODER,
    activation,
    check_fields,
    decoder_sizes,
    read_layer_ropes,
    read_layers,
    read_ropes,
    rule_sizes,
)
from mpo_megatron.families.rules import (
    Rule,
    attention_rules,
    embedding_rules,
    final_norm_rule,
    gated_rules,
    mlp_names,
    norm_rule,
    qk_norm_rules,
)


def read_olmo2(config: PretrainedConfig) -> Family:
    """OLMo 2."""
    check_fields(config, DECODER)
    return Family(
        **decoder_sizes(config),
        activation=activation(config),
        pre_norms=False,
        post_norms=True,
        qk_norm="width",
        ropes=read_ropes(config),
        attention=read_layers(config, ["full_attention"] * config.num_hidden_layers),
        rules=_rules(config),
    )


def read_olmo3(config: PretrainedConfig) -> Family:
    """OLMo 3."""
    check_fields(config, DECODER | {"sliding_window", "layer_types"})
    ropes, index = read_layer_ropes(config)
    return Family(
        **decoder_sizes(config),
        activation=activation(config),
        pre_norms=False,
        post_norms=True,
        qk_norm="width",
        ropes=ropes,
        attention=read_layers(config, rope=index),
        rules=_rules(config),
    )


def _rules(config: PretrainedConfig) -> tuple[Rule, ...]:
    sizes = rule_sizes(config)
    hidden, heads, groups, channels = (sizes[name] for name in ("hidden", "heads", "groups", "channels"))
    embedding, *output = embedding_rules(sizes["vocab"], hidden, tied=sizes["tied"])
    return (
        embedding,
        *attention_rules(hidden, heads, groups, channels),
        *qk_norm_rules(heads * channels, groups * channels, shard="rows"),
        norm_rule("self_attention.linear_proj.post_layernorm.weight", "post_attention_layernorm.weight", hidden),
        *gated_rules("mlp.", mlp_names("mlp."), hidden, sizes["ffn"]),
        norm_rule("mlp.linear_fc2.post_layernorm.weight", "post_feedforward_layernorm.weight", hidden),
        final_norm_rule(hidden),
        *output,
    )

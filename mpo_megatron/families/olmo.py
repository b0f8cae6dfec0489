"""OLMo 2 and 3: norms only on the outputs of attention and MLP; queries and keys normalized over all heads together.

In OLMo 3, three of four layers have a window, and only the rotary embedding of the others is scaled.
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
    decoder_rules,
    gated_rules,
    mlp_names,
    post_norm_rules,
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
    attention_norm, mlp_norm = post_norm_rules(sizes.hidden)
    return decoder_rules(
        sizes,
        [
            *attention_rules(sizes),
            *qk_norm_rules(sizes.heads * sizes.channels, sizes.groups * sizes.channels, shard="rows"),
            attention_norm,
            *gated_rules("mlp.", mlp_names("mlp."), sizes.hidden, sizes.ffn),
            mlp_norm,
        ],
    )

"""Llama 2, 3, 3.1, 3.2 and 3.3, and models with their architecture: SmolLM2, TinyLlama, llama2.c."""

from __future__ import annotations

from transformers import PretrainedConfig

from mpo_megatron.families.family import Family
from mpo_megatron.families.fields import (
    DECODER,
    activation,
    check_fields,
    decoder_sizes,
    read_layers,
    read_ropes,
    rule_sizes,
)
from mpo_megatron.families.rules import llama_rules


def read_llama(config: PretrainedConfig) -> Family:
    """Llama; `rope_parameters` describes `llama3` and other scalings of the rotary embedding."""
    check_fields(config, DECODER | {"pretraining_tp"})  # records how its weights were once sharded
    return Family(
        **decoder_sizes(config),
        activation=activation(config),
        ropes=read_ropes(config),
        attention=read_layers(config, ["full_attention"] * config.num_hidden_layers),
        rules=llama_rules(rule_sizes(config)),
    )

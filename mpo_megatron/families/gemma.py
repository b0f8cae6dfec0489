"""Gemma 2 and the text models of Gemma 3: norms on both sides of attention and MLP, scaled embeddings, alternating windows.

Gemma 2 caps attention scores and logits; Gemma 3 normalizes queries and keys, and its windowed layers have their own rotary
embedding.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PretrainedConfig

from mpo_megatron.config import require
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
from mpo_megatron.families.rules import Rule, decoder_rules, mlp_rules, normed_attention_rules, post_norm_rules

FIELDS = DECODER | {
    *("hidden_activation", "query_pre_attn_scalar", "sliding_window", "layer_types"),
    *("final_logit_softcapping", "attn_logit_softcapping"),
    # published files also contain these; transformers maps them to the fields above or ignores them
    *("hidden_act", "sliding_window_size", "sliding_window_pattern", "_sliding_window_pattern", "rope_local_base_freq"),
}


def read_gemma2(config: PretrainedConfig) -> Family:
    """Gemma 2."""
    check_fields(config, FIELDS)
    return Family(
        **_features(config),
        score_cap=config.attn_logit_softcapping,
        logit_cap=config.final_logit_softcapping,
        ropes=read_ropes(config),
        attention=read_layers(config),
        rules=_rules(config, qk_norm=False),
    )


def read_gemma3(config: PretrainedConfig) -> Family:
    """The text model of Gemma 3."""
    check_fields(config, FIELDS)
    ropes, index = read_layer_ropes(config)
    return Family(
        **_features(config),
        qk_norm="head",
        score_cap=config.attn_logit_softcapping,
        logit_cap=config.final_logit_softcapping,
        ropes=ropes,
        attention=read_layers(config, rope=index),
        rules=_rules(config, qk_norm=True),
    )


def _features(config: PretrainedConfig) -> dict[str, Any]:
    scalar = config.query_pre_attn_scalar
    require(scalar > 0, f"config.json: query_pre_attn_scalar = {scalar}; it must be positive; check or copy the file again.")
    return decoder_sizes(config) | {
        "activation": activation(config, "hidden_activation"),
        "norm_offset": True,
        "post_norms": True,
        "query_scale": scalar**-0.5,
        "embedding_scale": torch.tensor(config.hidden_size**0.5).item(),
    }


def _rules(config: PretrainedConfig, *, qk_norm: bool) -> tuple[Rule, ...]:
    sizes = rule_sizes(config)
    attention_norm, mlp_norm = post_norm_rules(sizes.hidden)
    return decoder_rules(
        sizes,
        [
            *normed_attention_rules(sizes, qk_norm=qk_norm),
            attention_norm,
            *mlp_rules(sizes, "pre_feedforward_layernorm.weight"),
            mlp_norm,
        ],
    )

"""The operations of a forward pass are those that torch counts in `transformers`."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, PretrainedConfig, Qwen2MoeConfig, Qwen3_5TextConfig, Qwen3Config, Qwen3MoeConfig

from mpo_megatron.families import read_family
from mpo_megatron.hf.flops import build_flop_model

SIZES: dict[str, Any] = {
    **{"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"vocab_size": 250},
}
EXPERTS: dict[str, Any] = {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 48}
TOKENS = 16


@pytest.mark.parametrize(
    "config",
    [
        Qwen3Config(**SIZES, head_dim=32),
        Qwen3MoeConfig(**EXPERTS, head_dim=32),
        Qwen2MoeConfig(**EXPERTS, shared_expert_intermediate_size=80, mlp_only_layers=[1]),
    ],
    ids=lambda config: config.model_type,
)
def test_operations_of_a_row(config: PretrainedConfig) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(TOKENS)[None])
    flops = build_flop_model(read_family(config))
    # Eager attention computes all pairs of tokens, also those that a mask hides; and the logits of all tokens.
    expected = flops.per_token * TOKENS + flops.per_pair * TOKENS**2 + flops.per_scored * TOKENS
    rotary = 2 * 16 * TOKENS if config.model_type == "qwen2_moe" else 2 * 32 * TOKENS
    assert abs(counter.get_total_flops() - expected) <= rotary  # angles of positions, an outer product


def test_linear_layers_and_convolutions_of_gated_delta_nets() -> None:
    """The rule itself is not compared: `transformers` computes it in chunks, which takes more products."""
    torch.manual_seed(0)
    net = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 8}
    config = Qwen3_5TextConfig(**{**SIZES, **net, "num_hidden_layers": 4}, head_dim=32)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(TOKENS)[None])
    counts = counter.get_flop_counts()["Global"]
    family = read_family(config)
    assert family.delta_net is not None
    layers, own = family.num_states, family.delta_net
    convolved, rule = 2 * layers * own.taps * own.convolved, 2 * layers * 3 * own.state
    flops = build_flop_model(family)
    assert layers == 3
    assert counts[torch.ops.aten.mm] == (flops.per_token - convolved - rule + flops.per_scored) * TOKENS
    assert counts[torch.ops.aten.convolution] == convolved * (TOKENS + own.taps - 1)  # padded at both ends, then cut


@pytest.mark.parametrize("frozen", [False, True])
def test_operations_of_a_step(frozen: bool) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(**SIZES, head_dim=32)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").requires_grad_(not frozen)
    embedded = torch.randn(1, TOKENS, config.hidden_size, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        model(inputs_embeds=embedded).logits.sum().backward()
    flops = build_flop_model(read_family(config), frozen=frozen)
    expected = flops.train_step(tokens=TOKENS, pairs=TOKENS**2, scored=TOKENS)
    assert abs(counter.get_total_flops() - expected) <= 2 * 32 * TOKENS  # angles of positions, an outer product

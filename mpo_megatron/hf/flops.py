"""Floating-point operations of a packed row, for throughput figures and for balancing replicas."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from mpo_megatron.hf.config import head_dim
from mpo_megatron.hf.experts import read_experts

BACKWARD = 2
"""A backward pass multiplies twice for each multiplication of the forward pass: gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class FlopModel:
    """Operations of a forward pass by what causes them; an element-wise operation counts nothing."""

    per_token: int
    """Linear layers of the decoder, for one token of a row; of experts, those that a token goes to."""
    per_pair: int
    """Attention scores and values, for one pair of attending tokens."""
    per_scored: int
    """Output layer, for one scored token."""

    @property
    def pair_weight(self) -> float:
        """Cost of an attending pair relative to a token."""
        return self.per_pair / self.per_token

    def train_step(self, *, tokens: int, pairs: int, scored: int) -> int:
        """Operations of one forward and one backward pass; recomputation counts nothing."""
        return (1 + BACKWARD) * (self.per_token * tokens + self.per_pair * pairs + self.per_scored * scored)


def build_flop_model(hf_config: PretrainedConfig) -> FlopModel:
    """The operations of this model."""
    hidden, layers = hf_config.hidden_size, hf_config.num_hidden_layers
    query = hf_config.num_attention_heads * head_dim(hf_config)
    key_value = hf_config.num_key_value_heads * head_dim(hf_config)
    attention_weights = hidden * (query + 2 * key_value) + query * hidden
    return FlopModel(
        per_token=2 * (layers * attention_weights + sum(_mlp_weights(hf_config))),
        per_pair=4 * layers * query,
        per_scored=2 * hidden * hf_config.vocab_size,
    )


def _mlp_weights(hf_config: PretrainedConfig) -> list[int]:
    """Weights a token meets in the MLP of each layer: gate, up and down, with experts also a router and the shared one's gate."""
    hidden, experts = hf_config.hidden_size, read_experts(hf_config)
    dense = 3 * hidden * hf_config.intermediate_size
    if experts is None:
        return [dense] * hf_config.num_hidden_layers
    sparse = 3 * hidden * experts.per_token * experts.channels + hidden * experts.num
    if experts.shared_channels is not None:
        sparse += 3 * hidden * experts.shared_channels + hidden
    return [sparse if has_experts else dense for has_experts in experts.layers]

"""Floating-point operations of a packed row, for throughput figures and for balancing replicas."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PretrainedConfig

from mpo_megatron.model.architecture import head_dim

BACKWARD = 2
"""A backward pass multiplies twice for each multiplication of the forward pass: gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class FlopModel:
    """Operations of a forward pass by what causes them; an element-wise operation counts nothing."""

    per_token: int
    """Linear layers of the decoder, for one token of a row."""
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
    mlp_weights = 3 * hidden * hf_config.intermediate_size
    return FlopModel(
        per_token=2 * layers * (attention_weights + mlp_weights),
        per_pair=4 * layers * query,
        per_scored=2 * hidden * hf_config.vocab_size,
    )

"""What a model computes, as features: every consumer reads these, and none asks for a model's name.

Fields that config.json has, too, keep its names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from transformers import PretrainedConfig

from mpo_megatron.families.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of some of the layers."""

    inverse_frequencies: tuple[float, ...]
    """Radians per position of each pair of channels, as float32 computes them."""
    factor: float = 1.0
    """Factor of cosines and sines (yarn's attention factor): scores of queries and keys grow with its square."""
    limit: int | None = None
    """First position for which `transformers` would change the frequencies; None if it never does."""


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """What layers may differ in."""

    window: int | None = None
    """A token attends to this many tokens, itself included; None: to all before it."""
    rope: int = 0
    """Index in `Family.ropes`."""


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Layers with a Gated DeltaNet in attention's place: their past is a state of fixed size, one matrix for each value head.

    Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464.
    """

    key_heads: int
    value_heads: int
    """A multiple of `key_heads`: each head of queries and keys serves as many consecutive value heads."""
    key_channels: int
    """Of one head of queries or keys."""
    value_channels: int
    """Of one value head."""
    taps: int
    """Tokens that the convolution of queries, keys and values spans, the last one included."""
    layers: tuple[bool, ...]
    """Which layers are of this kind; the others have attention."""

    @property
    def keys(self) -> int:
        """Channels of all keys, and of all queries."""
        return self.key_heads * self.key_channels

    @property
    def values(self) -> int:
        """Channels of all values, and of their gates."""
        return self.value_heads * self.value_channels

    @property
    def convolved(self) -> int:
        """Channels that the convolution mixes over tokens."""
        return 2 * self.keys + self.values

    @property
    def inputs(self) -> int:
        """Channels of the input projection: queries, keys, values, gates, and two numbers for each value head."""
        return self.convolved + self.values + 2 * self.value_heads

    @property
    def state(self) -> int:
        """Elements of a layer's state after any number of tokens."""
        return self.value_heads * self.key_channels * self.value_channels


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model."""

    num: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token goes to."""
    channels: int
    """Intermediate size of an expert."""
    shared_channels: int | None = None
    """Intermediate size of the shared expert; None without one."""
    normalized: bool = True
    """Whether a token's probabilities are made to sum to 1 over its experts."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others have a dense MLP."""
    size_field: str = "moe_intermediate_size"
    """config.json's name of `channels`."""

    @property
    def everywhere(self) -> bool:
        """Whether all layers have experts."""
        return all(self.layers)

    @property
    def id_bytes(self) -> int:
        """Bytes of an expert's number on disk."""
        return 1 if self.num <= 256 else 2

    @property
    def choices(self) -> int:
        """Choices of experts for a token, in all layers."""
        return sum(self.layers) * self.per_token


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder: embedding, layers of attention (or a Gated DeltaNet) and MLP with RMS norms and residuals, norm, output."""

    config: PretrainedConfig = field(compare=False, repr=False)
    """The Hugging Face config that all this was read from, to build the model of `transformers`."""
    whole_config: PretrainedConfig | None = field(default=None, compare=False, repr=False)
    """Of a multimodal model, whose text model this is; None if config.json describes the language model alone."""

    num_hidden_layers: int
    hidden_size: int
    intermediate_size: int
    """Channels of a dense MLP."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    """Rows of the embedding, without padding."""
    max_position_embeddings: int
    tie_word_embeddings: bool
    """Whether the output layer's weight is the embedding's."""

    rms_norm_eps: float
    norm_offset: bool = False
    """Whether a norm multiplies by 1 + its weight."""
    pre_norms: bool = True
    """Whether attention and MLP each have a norm on their input."""
    post_norms: bool = False
    """Whether attention and MLP each have a norm on their output, before the residual is added."""
    qk_norm: Literal["head", "width"] | None = None
    """RMS norm of queries and keys before the rotation: of each head, or over all heads together."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias; no other layer has one."""
    output_gate: bool = False
    """Whether attention's output is multiplied by the sigmoid of a gate of the same width, which the query projection yields."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Of the MLP's gate."""

    ropes: tuple[Rope, ...]
    attention: tuple[LayerAttention, ...]
    """Of each layer; it says nothing of one that is a Gated DeltaNet."""
    query_scale: float
    """Factor of scores, without that of the rotary embedding: usually 1 / √head_dim."""
    score_cap: float | None = None
    """Scores s become cap · tanh(s / cap) before the softmax."""
    embedding_scale: float = 1.0
    """Factor of embeddings."""
    logit_cap: float | None = None
    """The same for the output layer's logits."""

    delta_net: DeltaNet | None = None
    """None if all layers have attention."""
    experts: Experts | None = None
    """None for a dense model."""
    rules: tuple[Rule, ...] = field(repr=False)
    """Where every weight is in a Megatron checkpoint."""
    other_weights: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """How the names begin of weights that checkpoints may have besides, and that are not trained."""

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the embedding."""
        return next(iter(self.rules[0].parts))

    @property
    def outer_config(self) -> PretrainedConfig:
        """What config.json describes as a whole."""
        return self.whole_config or self.config

    @property
    def queries(self) -> int:
        """Channels of all queries."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Channels of all keys, and of all values."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_channels(self) -> int:
        """Channels of a head that are rotated: the first ones."""
        return 2 * len(self.ropes[0].inverse_frequencies)

    def has_state(self, layer: int) -> bool:
        """Whether a layer is a Gated DeltaNet."""
        return self.delta_net is not None and self.delta_net.layers[layer]

    @property
    def num_states(self) -> int:
        """Layers that are Gated DeltaNets."""
        return sum(self.delta_net.layers) if self.delta_net else 0

    @property
    def num_attentions(self) -> int:
        """Layers that have attention."""
        return self.num_hidden_layers - self.num_states

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same weights. Megatron's checkpoints stack the layers' tensors if so."""
        return self.delta_net is None and (self.experts is None or self.experts.everywhere)

    @property
    def num_experts(self) -> int:
        """Experts of a layer; 0 in a dense model."""
        return self.experts.num if self.experts else 0

    @property
    def active_experts(self) -> int:
        """Experts that a token goes through."""
        return self.experts.per_token if self.experts else 0

    @property
    def expert_ffn(self) -> int:
        """Channels of an expert."""
        return self.experts.channels if self.experts else 0

    @property
    def shared_ffn(self) -> int:
        """Channels of the expert that all tokens go through; 0 if there is none."""
        return (self.experts.shared_channels or 0) if self.experts else 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP consists of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def window(self) -> int | None:
        """The window of the layers that have one; None if none has."""
        windows = {layer.window for layer in self.attention} - {None}
        return max((window for window in windows if window is not None), default=None)

    @property
    def num_windowed(self) -> int:
        """Layers with a window."""
        return sum(layer.window is not None for layer in self.attention)

    def score_scale(self, layer: int) -> float:
        """Factor of a layer's scores of queries and keys that were rotated by angles alone."""
        return self.query_scale * self.ropes[self.attention[layer].rope].factor ** 2

    def difference(self, other: Family) -> str | None:
        """The first feature in which two models differ; None if one's weights can be loaded in the other's place."""
        for item in dataclasses.fields(self):
            if item.compare and getattr(self, item.name) != getattr(other, item.name):
                return item.name
        return None

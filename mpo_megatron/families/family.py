"""A model's computation as features: every consumer reads these features, never a model's name.

Fields that also exist in config.json keep their names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from transformers import PretrainedConfig

from mpo_megatron.families.rules import Rule


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of some layers."""

    inverse_frequencies: tuple[float, ...]
    """Radians per position for each pair of channels, computed in float32."""
    factor: float = 1.0
    """Factor of cosines and sines (yarn's attention factor): scores grow with its square."""
    limit: int | None = None
    """First position from which `transformers` changes the frequencies; None if it never does."""


@dataclass(frozen=True, kw_only=True)
class LayerAttention:
    """Attention features that may differ between layers."""

    window: int | None = None
    """Number of tokens that a token attends to, itself included; None: all before it."""
    rope: int = 0
    """Index in `Family.ropes`."""


@dataclass(frozen=True, kw_only=True)
class DeltaNet:
    """Layers with a Gated DeltaNet instead of attention: their past is a fixed-size state, one matrix per value head.

    Yang et al., Gated Delta Networks: Improving Mamba2 with Delta Rule, arXiv:2412.06464.
    """

    key_heads: int
    value_heads: int
    """A multiple of `key_heads`: each query/key head serves value_heads / key_heads consecutive value heads."""
    key_channels: int
    """Channels of one query or key head."""
    value_channels: int
    """Channels of one value head."""
    taps: int
    """Tokens that the convolution of queries, keys and values spans, including the current one."""
    layers: tuple[bool, ...]
    """Layers of this kind; the others have attention."""

    @property
    def keys(self) -> int:
        """Channels of all keys, which equal those of all queries."""
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
    """The experts of a mixture-of-experts model."""

    num: int
    """Experts of a layer."""
    per_token: int
    """Experts per token."""
    channels: int
    """Intermediate size of an expert."""
    shared_channels: int | None = None
    """Intermediate size of the shared expert; None without one."""
    normalized: bool = True
    """Whether a token's probabilities are normalized to sum to 1 over its experts."""
    layers: tuple[bool, ...]
    """Layers with experts; the others have a dense MLP."""
    size_field: str = "moe_intermediate_size"
    """Name of `channels` in config.json."""

    @property
    def everywhere(self) -> bool:
        """Whether all layers have experts."""
        return all(self.layers)

    @property
    def id_bytes(self) -> int:
        """Bytes of an expert id on disk."""
        return 1 if self.num <= 256 else 2

    @property
    def choices(self) -> int:
        """Number of expert choices per token, over all layers."""
        return sum(self.layers) * self.per_token


@dataclass(frozen=True, kw_only=True)
class Family:
    """A decoder: embedding, layers of attention (or a Gated DeltaNet) and MLP with RMS norms and residuals, norm, output."""

    config: PretrainedConfig = field(compare=False, repr=False)
    """The Hugging Face config from which the features were read; builds the model of `transformers`."""
    whole_config: PretrainedConfig | None = field(default=None, compare=False, repr=False)
    """For the text model of a multimodal model: the whole config; None if config.json describes the language model alone."""

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
    """Whether the output layer shares the embedding's weight."""

    rms_norm_eps: float
    norm_offset: bool = False
    """Whether a norm multiplies by 1 + its weight."""
    pre_norms: bool = True
    """Whether attention and MLP each have a norm on the input."""
    post_norms: bool = False
    """Whether attention and MLP each have a norm on the output, before the residual is added."""
    qk_norm: Literal["head", "width"] | None = None
    """RMS norm of queries and keys before rotation: per head, or over all heads together."""
    qkv_bias: bool = False
    """Whether queries, keys and values have a bias; no other layer has one."""
    output_gate: bool = False
    """Whether a sigmoid gate of the same width, from the query projection, multiplies attention's output."""
    activation: Literal["silu", "gelu_tanh"] = "silu"
    """Activation of the MLP's gate."""

    ropes: tuple[Rope, ...]
    attention: tuple[LayerAttention, ...]
    """Attention features of each layer; ignored for a Gated DeltaNet."""
    query_scale: float
    """Factor of scores, without the rotary embedding's: usually 1 / √head_dim."""
    score_cap: float | None = None
    """Scores s become cap · tanh(s / cap) before the softmax."""
    embedding_scale: float = 1.0
    """Factor of the embeddings."""
    logit_cap: float | None = None
    """Cap of the output layer's logits, likewise."""

    delta_net: DeltaNet | None = None
    """None if all layers have attention."""
    experts: Experts | None = None
    """None for a dense model."""
    rules: tuple[Rule, ...] = field(repr=False)
    """Location of every weight in a Megatron checkpoint."""
    other_weights: tuple[str, ...] = field(default=(), compare=False, repr=False)
    """Prefixes of further weights in checkpoints, which are not trained."""
    predicting_layers: int = field(default=0, compare=False, repr=False)
    """Layers for multi-token prediction, by config.json; their weights are among these."""

    @property
    def embedding_name(self) -> str:
        """Hugging Face name of the embedding."""
        return next(iter(self.rules[0].parts))

    @property
    def outer_config(self) -> PretrainedConfig:
        """The config that config.json describes as a whole."""
        return self.whole_config or self.config

    @property
    def queries(self) -> int:
        """Channels of all query heads."""
        return self.num_attention_heads * self.head_dim

    @property
    def keys(self) -> int:
        """Channels of all key heads, which equal those of all value heads."""
        return self.num_key_value_heads * self.head_dim

    @property
    def rotary_channels(self) -> int:
        """Number of rotated channels per head: the first ones."""
        return 2 * len(self.ropes[0].inverse_frequencies)

    def has_state(self, layer: int) -> bool:
        """Whether a layer is a Gated DeltaNet."""
        return self.delta_net is not None and self.delta_net.layers[layer]

    @property
    def num_states(self) -> int:
        """Number of Gated DeltaNet layers."""
        return sum(self.delta_net.layers) if self.delta_net else 0

    @property
    def num_attentions(self) -> int:
        """Number of attention layers."""
        return self.num_hidden_layers - self.num_states

    @property
    def uniform(self) -> bool:
        """Whether all layers have the same weights. If so, Megatron's checkpoints stack the layers' tensors."""
        return self.delta_net is None and (self.experts is None or self.experts.everywhere)

    @property
    def num_experts(self) -> int:
        """Experts per layer; 0 in a dense model."""
        return self.experts.num if self.experts else 0

    @property
    def active_experts(self) -> int:
        """Experts per token."""
        return self.experts.per_token if self.experts else 0

    @property
    def expert_ffn(self) -> int:
        """Intermediate size of an expert."""
        return self.experts.channels if self.experts else 0

    @property
    def shared_ffn(self) -> int:
        """Intermediate size of the shared expert; 0 without one."""
        return (self.experts.shared_channels or 0) if self.experts else 0

    def has_experts(self, layer: int) -> bool:
        """Whether a layer's MLP is a mixture of experts."""
        return self.experts is not None and self.experts.layers[layer]

    @property
    def window(self) -> int | None:
        """The window of layers with one; None if no layer has one."""
        windows = {layer.window for layer in self.attention} - {None}
        return max((window for window in windows if window is not None), default=None)

    @property
    def num_windowed(self) -> int:
        """Number of layers with a window."""
        return sum(layer.window is not None for layer in self.attention)

    @property
    def rotation_factors(self) -> tuple[float, ...]:
        """Factors of the rotated channels of queries and keys, for each of `ropes`, if only part of each head is rotated; 1
        otherwise: `score_scale` then includes the factor."""
        whole = self.rotary_channels == self.head_dim
        return tuple(1.0 if whole else rope.factor for rope in self.ropes)

    def score_scale(self, layer: int) -> float:
        """Factor of a layer's scores; rotation contributes `rotation_factors`."""
        rope = self.attention[layer].rope
        return self.query_scale * (self.ropes[rope].factor / self.rotation_factors[rope]) ** 2

    def difference(self, other: Family) -> str | None:
        """The first feature in which two models differ; None if their weights are interchangeable."""
        for item in dataclasses.fields(self):
            if item.compare and getattr(self, item.name) != getattr(other, item.name):
                return item.name
        return None

"""Floating-point operations of a packed row, for throughput figures and for balancing replicas."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_megatron.families import Family

BACKWARD = 2
"""A backward pass multiplies twice for each multiplication of the forward pass: gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class FlopModel:
    """Operations of a forward pass by what causes them; an element-wise operation counts nothing."""

    per_token: int
    """Linear layers of the decoder, for one token of a row; of experts, those that a token goes to."""
    per_pair: int
    """Attention scores and values, for one pair of attending tokens (as a mean over layers)."""
    per_scored: int
    """Output layer, for one scored token."""
    frozen: bool = False
    """Whether the weights have no gradients, because an adapter is trained beside them; the adapter's own operations count
    nothing."""
    window: tuple[int, float] | None = None
    """Tokens of the layers' sliding window, and the share of layers that have it; pairs are counted with it."""

    @property
    def pair_weight(self) -> float:
        """Cost of an attending pair relative to a token."""
        return self.per_pair / self.per_token

    @property
    def backward(self) -> int:
        """Multiplications of a backward pass by the weights, for each of the forward pass."""
        return BACKWARD - self.frozen

    def train_step(self, *, tokens: int, pairs: int, scored: int) -> int:
        """Operations of one forward and one backward pass; recomputation counts nothing."""
        by_weights = self.per_token * tokens + self.per_scored * scored
        return (1 + self.backward) * by_weights + (1 + BACKWARD) * self.per_pair * pairs


def build_flop_model(family: Family, *, frozen: bool = False) -> FlopModel:
    """The operations of this model.

    Args:
        frozen: an adapter is trained, and not the weights
    """
    hidden, layers = family.hidden_size, family.num_attentions
    gates = family.queries if family.output_gate else 0
    attention_weights = hidden * (family.queries + gates + 2 * family.keys) + family.queries * hidden
    return FlopModel(
        per_token=2 * (layers * attention_weights + family.num_states * _delta_net_products(family) + sum(_mlp_weights(family))),
        per_pair=4 * layers * family.queries,
        per_scored=2 * hidden * family.vocab_size,
        frozen=frozen,
        window=None if family.window is None else (family.window, family.num_windowed / layers),
    )


def _delta_net_products(family: Family) -> int:
    """Multiplications of a Gated DeltaNet for a token: projections, convolution, and three products with the state: what it holds
    for the key, the correction, and what the query reads. Computing them in chunks takes more, which counts nothing."""
    net = family.delta_net
    if net is None:
        return 0
    return family.hidden_size * (net.inputs + net.values) + net.taps * net.convolved + 3 * net.state


def _mlp_weights(family: Family) -> list[int]:
    """Weights a token meets in the MLP of each layer: gate, up and down, with experts also a router and the shared one's gate."""
    hidden, experts = family.hidden_size, family.experts
    dense = 3 * hidden * family.intermediate_size
    if experts is None:
        return [dense] * family.num_hidden_layers
    sparse = 3 * hidden * experts.per_token * experts.channels + hidden * experts.num
    if experts.shared_channels is not None:
        sparse += 3 * hidden * experts.shared_channels + hidden
    return [sparse if has_experts else dense for has_experts in experts.layers]

"""Floating-point operations of a packed row, for throughput figures and load balancing."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_megatron.families import Family

BACKWARD = 2
"""Multiplications of a backward pass per multiplication of the forward pass: gradients of inputs and of weights."""


@dataclass(frozen=True, kw_only=True)
class FlopModel:
    """Operations of a forward pass by cause; element-wise operations are not counted."""

    per_token: int
    """Linear layers of the decoder, per token of a row; of the experts, only the token's own."""
    per_pair: int
    """Attention scores and values, per pair of attending tokens (mean over layers)."""
    per_scored: int
    """Output layer, per scored token."""
    frozen: bool = False
    """Whether the weights are frozen, because only an adapter is trained; the adapter's own operations are not counted."""
    window: tuple[int, float] | None = None
    """Size of the sliding window in tokens, and the share of layers with it; determines the number of pairs."""

    @property
    def pair_weight(self) -> float:
        """Cost of an attending pair relative to a token."""
        return self.per_pair / self.per_token

    @property
    def backward(self) -> int:
        """Weight multiplications of a backward pass, per multiplication of the forward pass."""
        return BACKWARD - self.frozen

    def train_step(self, *, tokens: int, pairs: int, scored: int) -> int:
        """Operations of one forward and one backward pass, without recomputation."""
        by_weights = self.per_token * tokens + self.per_scored * scored
        return (1 + self.backward) * by_weights + (1 + BACKWARD) * self.per_pair * pairs


def build_flop_model(family: Family, *, frozen: bool = False) -> FlopModel:
    """The operations of this model.

    Args:
        frozen: an adapter is trained instead of the weights
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
    """Multiplications of a Gated DeltaNet per token: projections, convolution, and three products with the state (reading for the
    key, correcting, reading for the query). Computing them in chunks takes more, which is not counted."""
    net = family.delta_net
    if net is None:
        return 0
    return family.hidden_size * (net.inputs + net.values) + net.taps * net.convolved + 3 * net.state


def _mlp_weights(family: Family) -> list[int]:
    """MLP weights that a token passes in each layer: gate, up and down; with experts, also a router and the shared expert's
    gate."""
    hidden, experts = family.hidden_size, family.experts
    dense = 3 * hidden * family.intermediate_size
    if experts is None:
        return [dense] * family.num_hidden_layers
    sparse = 3 * hidden * experts.per_token * experts.channels + hidden * experts.num
    if experts.shared_channels is not None:
        sparse += 3 * hidden * experts.shared_channels + hidden
    return [sparse if has_experts else dense for has_experts in experts.layers]

"""Bytes that autograd keeps of a Gated DeltaNet, in place of attention's. Legend as in memory.py; C tokens per chunk."""

from __future__ import annotations

from mpo_megatron.config import ModelConfig
from mpo_megatron.families import DeltaNet

FLOAT32 = 4


def delta_net_kept(net: DeltaNet, model: ModelConfig, *, tokens: int, ranks: int, gpu: bool, recomputed: bool) -> int:
    """Bytes of one layer for one row, between the input norm and the following residual.

    Args:
        tokens: t; with context parallelism a rank has all tokens of some heads, which needs as much
        ranks: number of tensor-parallel ranks that share the heads
        recomputed: everything between the projections is recomputed
    """
    b = 2 if model.precision == "bf16" else 4
    values, convolved = net.values // ranks, net.convolved // ranks
    if recomputed:
        return tokens * b * (net.inputs // ranks + values)  # outputs of the input projection, inputs of the output projection
    kernels = gpu and b == 2 and model.delta_rule != "torch"
    rule = (_kernels_kept if kernels else _operations_kept)(net, model.delta_chunk)
    # Input and output of the convolution; values by heads; norm and gate, in float32 and rounded; input of the output projection.
    around = 2 * convolved * b + values * b + values * (3 * FLOAT32 + 2 * b) + values * b
    return tokens * (rule // ranks + around)


def _operations_kept(net: DeltaNet, chunk: int) -> int:
    """Bytes per token in plain operations (`torch`), all float32: queries and keys before and after normalization; chunks'
    decays, products and linear system; its right-hand side and solution; and the initial state of every chunk."""
    heads, keys, values = net.value_heads, net.key_channels, net.value_channels
    vectors = 4 * net.keys + heads * (2 * keys + 2 * (keys + values) + values)
    return FLOAT32 * (vectors + chunk * (4 * heads + 2 * net.key_heads) + net.state // chunk)


def _kernels_kept(net: DeltaNet, chunk: int) -> int:
    """Bytes per token in flash-linear-attention's kernels (`fla`), in bf16: normalized queries and keys, and per value head the
    inverse of the system; states are recomputed."""
    return 2 * (2 * net.keys + net.value_heads * chunk)

"""Bytes that a training step moves through device memory outside of matrix products: reads and writes of element-wise kernels.

Counted kernel by kernel for what Transformer Engine fuses: RMS norms, residuals, rotary embedding, SwiGLU, casts to FP8, sorting
of tokens by expert. The traffic of matrix products and attention is part of their efficiencies.
"""

from __future__ import annotations

from dataclasses import dataclass

from mpo_megatron.plan.memory_layout import GRADIENT_BYTES, MemoryLayout

CAST_BYTES = 2
"""Bytes per element that a cast to FP8 writes: for the product, and transposed for the gradient's."""
LOGIT_BYTES = 12
"""Memory passes per logit: written in the compute dtype, read for the softmax, both again in the backward pass, its gradient
written and read."""


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes per token in one layer."""

    forward: float
    backward: float


def layer_traffic(layout: MemoryLayout, *, experts: bool) -> Traffic:
    """Bytes of attention's half and of the MLP's, or the experts'."""
    shape, b = layout.shape, layout.dtype_bytes
    hidden = shape.hidden_size / layout.sequence_parts
    queries, keys = shape.queries / layout.parallel.tensor, shape.keys / layout.parallel.tensor
    norms = 2 * (2 + 3) * hidden  # x → norm(x); x + y
    norms_backward = 2 * (3 + 3) * hidden  # x, dy → dx; the gradients of x and norm(x) are summed
    rotated = 2 * (queries + keys) * (2 if shape.qk_norm else 1)
    cast, cast_backward = _casts(layout, shape.hidden_size + queries, queries + 2 * keys + hidden)
    mlp = _experts(layout) if experts else _mlp(layout, shape.intermediate_size / layout.parallel.tensor)
    return Traffic(
        forward=b * (norms + rotated) + cast + mlp.forward,
        backward=b * (norms_backward + rotated) + cast_backward + mlp.backward,
    )


def _casts(layout: MemoryLayout, forward: float, backward: float) -> tuple[float, float]:
    """Bytes to quantize this many elements of inputs, and of output gradients; none without FP8."""
    each = 0
    if layout.model.fp8 != "none":
        reads = 2 if layout.model.fp8 == "current" else 1  # one scale per tensor: needs its largest element first
        each = reads * layout.dtype_bytes + CAST_BYTES
    return each * forward, each * backward


def _mlp(layout: MemoryLayout, channels: float) -> Traffic:
    """SwiGLU: forward reads gate and value, writes the product; backward reads its gradient, gate and value, writes their
    gradients."""
    b, hidden = layout.dtype_bytes, layout.shape.hidden_size
    cast, cast_backward = _casts(layout, hidden + channels, hidden + 2 * channels)
    return Traffic(forward=b * 3 * channels + cast, backward=b * 5 * channels + cast_backward)


def _experts(layout: MemoryLayout) -> Traffic:
    """Copies of a token for its experts: made, sorted by expert, sorted back, and summed; SwiGLU."""
    shape, b = layout.shape, layout.dtype_bytes
    copies = shape.active_experts / layout.sequence_parts
    moved = b * shape.hidden_size * (6 * copies + 2 / layout.sequence_parts)
    routed = _mlp(layout, shape.expert_ffn / layout.parallel.expert_tensor)
    copies *= layout.parallel.expert_tensor
    shared = _mlp(layout, shape.shared_ffn / layout.parallel.tensor) if shape.shared_ffn else Traffic(forward=0, backward=0)
    return Traffic(
        forward=moved + copies * routed.forward + shared.forward,
        backward=moved + copies * routed.backward + shared.backward,
    )


def head_traffic(layout: MemoryLayout) -> float:
    """Bytes of a scored token's logits, forward and backward."""
    return LOGIT_BYTES * layout.vocabulary


def weight_traffic(trained: int) -> float:
    """Bytes per row: gradients are added to a float32 buffer."""
    return 2 * GRADIENT_BYTES * trained

"""Bytes of a row that autograd keeps for its backward pass, tensor by tensor.

Follows Korthikanti et al. 2022 (arXiv:2205.05198, Eq. 1–4), for the layers used here: RMS norm, grouped heads, SwiGLU, attention
over segments without a score matrix. Legend: memory_layout.py.
"""

from __future__ import annotations

from mpo_megatron.families.adapters import adapter_rules
from mpo_megatron.plan.delta_net import delta_net_kept
from mpo_megatron.plan.memory_layout import INDEX_BYTES, MemoryLayout
from mpo_megatron.plan.parameters import Part
from mpo_megatron.plan.rows import RowCounts

LEAVING = 2
"""Layers whose activations are being transferred to or from host memory at the same time (`model.offload_layers`)."""


def stage_kept(layout: MemoryLayout, part: Part, row: RowCounts) -> int:
    """Bytes kept of one row by one virtual stage, without the head."""
    hidden, b = layout.hidden(row), layout.dtype_bytes
    sent = 0 if part.last else hidden * b  # Megatron keeps what a stage sends
    if layout.model.recompute == "full":
        angles = layout.tokens(row) * layout.shape.head_dim * 4
        return len(part.layers) * hidden * b + angles + sent
    layers = [
        layer_kept(layout, row, experts=layout.shape.has_experts(layer), state=layout.shape.has_state(layer))
        for layer in part.layers
    ]
    if layout.model.offload_layers:  # one is transferred while the next one computes
        return sum(layers[layout.model.offload_layers :]) + LEAVING * max(layers) + sent
    return sum(layers) + sent


def layer_kept(layout: MemoryLayout, row: RowCounts, *, experts: bool = False, state: bool = False) -> int:
    """Bytes that autograd keeps of one layer for one row, except recomputed parts.

    Args:
        experts: the layer has experts
        state: the layer is a Gated DeltaNet
    """
    kept = _norms_kept(layout, row, experts=experts) + _adapters_kept(layout, row, experts=experts)
    kept += 0 if layout.recomputes("moe" if experts else "mlp") else _second_half(layout, row, experts=experts)
    if state:
        return kept + state_kept(layout, row, recomputed=layout.recomputes("core_attn"))
    kept += _projections_kept(layout, row)
    return kept if layout.recomputes("core_attn") else kept + core_kept(layout, row)


def state_kept(layout: MemoryLayout, row: RowCounts, *, recomputed: bool) -> int:
    """Bytes of a Gated DeltaNet, in place of attention's projections and core."""
    assert layout.shape.delta_net is not None
    return delta_net_kept(
        *(layout.shape.delta_net, layout.model),
        tokens=layout.tokens(row),
        ranks=layout.parallel.tensor,
        gpu=layout.kernels.gpu,
        recomputed=recomputed,
    )


def _adapters_kept(layout: MemoryLayout, row: RowCounts, *, experts: bool) -> int:
    """A x of each adapter in a layer [t, rank]; its input is the layer's own, which is kept anyway.

    Recomputation is ignored: the term is smaller than the output that a recomputed layer keeps anyway.
    """
    if layout.adapter is None:
        return 0
    tokens, narrow = layout.tokens(row), 0
    for rule in adapter_rules(layout.shape, layout.adapter):
        if not rule.per_layer or not rule.megatron.endswith("lora_A"):
            continue
        if ".mlp." in rule.megatron and (".experts." in rule.megatron) != experts:
            continue
        times = layout.shape.active_experts if rule.experts is not None else 1
        narrow += tokens * layout.adapter.rank * times // (layout.sequence_parts if rule.experts is not None else 1)
    return narrow * layout.dtype_bytes


def _second_half(layout: MemoryLayout, row: RowCounts, *, experts: bool) -> int:
    """Bytes of what follows the second norm: experts or a dense MLP."""
    return _moe_kept(layout, row) if experts else mlp_kept(layout, row)


def _norms_kept(layout: MemoryLayout, row: RowCounts, *, experts: bool = False) -> int:
    """Two norms: input (the residual) and output (the next product's input); unfused also the normalized input, and 1 / rms.

    Transformer Engine fuses them into the following products, except the norm before experts.
    """
    tokens, b, engine = layout.tokens(row), layout.dtype_bytes, layout.kernels.layers == "transformer_engine"
    hidden = layout.hidden(row)
    output = hidden * (layout.linear_input_bytes + (b if layout.keeps_normalized else 0)) + 4 * tokens // layout.sequence_parts
    outputs = 2 * output
    if layout.recomputes("layernorm"):
        outputs -= int(experts) * output
    elif layout.recomputes("mlp") and not experts and engine:
        outputs -= output
    return 2 * hidden * b + outputs


def _projections_kept(layout: MemoryLayout, row: RowCounts) -> int:
    """Bytes around the attention core: queries, keys and values before and after norm and rotation, and the result."""
    shape, tokens, b = layout.shape, layout.tokens(row), layout.dtype_bytes
    queries, keys, _ = layout.attention_widths
    fused = layout.kernels.gpu
    kept = queries * layout.linear_input_bytes if layout.model.fp8 != "none" else 0  # the output projection's quantized input
    if shape.qk_norm:
        normalized = queries + keys  # inputs; PyTorch's norm and the norm over all heads also keep the normalized ones
        normalized += queries if not fused and (shape.qk_norm == "width" or b < 4) else 0
        heads = (queries + keys) // shape.head_dim
        kept += normalized * b + 4 * heads
    if _core_keeps_inputs(layout, row):
        gates = queries if shape.output_gate else 0
        kept += (queries + gates + 2 * keys) * b  # the projection's output, because of the values in it
        kept += (queries + keys) * b  # rotated
    elif layout.parallel.context == 1:
        kept += queries * b  # rotated queries; keys and values are kept gathered
    elif shape.qk_norm and not fused:
        kept += (queries + 2 * keys) * b
    if layout.kernels.layers == "local" and b < 4:
        kept += 2 * shape.head_dim * b  # cosines and sines in bf16, for queries and for keys
    kept += queries * b  # the core's result
    kept += queries * (4 + b) if shape.output_gate else 0  # the gate's sigmoid in float32, and the gated result
    return kept * tokens


def _core_keeps_inputs(layout: MemoryLayout, row: RowCounts) -> bool:
    """Whether the core's inputs are kept unchanged: it is recomputed from them, or reads them in place."""
    if layout.recomputes("core_attn"):
        return True
    return layout.parallel.context == 1 and not (layout.kernels.attention == "varlen" and row.context)


def core_kept(layout: MemoryLayout, row: RowCounts) -> int:
    """Bytes within the attention core, all tokens of the row for this rank's heads: what its kernel keeps besides its inputs."""
    parallel, b = layout.parallel, layout.dtype_bytes
    queries, _, keys = (width // parallel.context for width in layout.attention_widths)
    by_segment = layout.kernels.attention == "sdpa" and layout.kernels.gpu  # on a CPU by blocks, which read the row in place
    kept = 4 * row.tokens * (queries // layout.shape.head_dim)  # log-sum-exp of every query
    if parallel.context > 1:
        kept += row.tokens * (queries + 2 * keys) * b  # received from the all-to-all
        kept += 0 if by_segment else row.tokens * queries * b  # the result, before it is sent back
    if layout.kernels.attention == "varlen":
        return kept + (row.tokens + row.context) * 2 * keys * b if row.context else kept
    if by_segment:
        kept += (row.context + row.responses) * 2 * keys * b  # gathered per response
        kept += row.tokens * queries * b  # results per segment, before concatenation
    return kept


def mlp_kept(layout: MemoryLayout, row: RowCounts, ffn: int | None = None) -> int:
    """SwiGLU: gate and value as one tensor (2F), the product (F); on a CPU also the activated gate (F).

    Megatron-Core's own, used by shared experts (`ffn`), also keeps a copy of the value on a CPU.
    """
    width = layout.shape.intermediate_size // layout.parallel.tensor if ffn is None else ffn
    b = layout.dtype_bytes
    extra = 0 if layout.kernels.gpu else 1 if ffn is None else 2
    return layout.tokens(row) * width * (2 * b + layout.linear_input_bytes + extra * b)


def _moe_kept(layout: MemoryLayout, row: RowCounts) -> int:
    """Experts, with tokens spread evenly: routing probabilities, the received tokens (H), and SwiGLU.

    Sorting, sending and summing keep only indices. On a CPU, SwiGLU keeps six tensors of F: gate and value, the activated gate,
    a copy of the value, and the product before and after the probabilities.
    """
    shape, parallel, b = layout.shape, layout.parallel, layout.dtype_bytes
    own = layout.tokens(row) // layout.sequence_parts
    routed = own * shape.active_experts * parallel.expert_tensor
    inner = shape.expert_ffn // parallel.expert_tensor * (2 if layout.recomputes("moe_act") else 3 if layout.kernels.gpu else 6)
    routing = layout.routing  # logits and probabilities; the losses keep them again, with each token's load density
    maps = 3 + 2 * (routing.balance_coeff > 0) + (routing.z_coeff > 0)
    kept = own * shape.num_experts * 4 * maps + routed * b * (shape.hidden_size + inner)
    if shape.shared_ffn and not layout.recomputes("shared_experts"):
        kept += mlp_kept(layout, row, shape.shared_ffn // parallel.tensor) + own * shape.hidden_size * b
    return kept


def head_kept(layout: MemoryLayout, part: Part, row: RowCounts) -> int:
    """The final norm, the hidden states [S, H] of scored tokens, and five numbers of each."""
    if not part.last:
        return 0
    norm = layout.hidden(row) * layout.dtype_bytes * (2 if layout.keeps_normalized else 1)
    scored = row.scored // layout.parallel.context
    return norm + scored * ((layout.shape.hidden_size + layout.head_rank) * layout.dtype_bytes + 5 * 4 + 2 * INDEX_BYTES + 1)

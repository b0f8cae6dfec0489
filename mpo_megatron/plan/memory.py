"""Bytes of one rank of a pipeline stage at the peak of a training step.

Static memory is exact: weights, gradients and optimizer states as Megatron-Core allocates them. What autograd keeps of a row is
counted tensor by tensor, following Korthikanti et al. 2022 (arXiv:2205.05198, Eq. 1–4), for the layers used here: RMS norm,
grouped heads, SwiGLU, attention over segments without a score matrix. The largest of a few moments of the backward pass is added.
docs/reference/planning.md gives the formulas and the measurements.

Legend: T tokens of a row, t = T / context tokens on one rank, s ranks that shard norms and residuals (sequence parallelism), H
hidden, q, k channels of queries and keys on one rank, F MLP channels on one rank, S scored tokens, C tokens of a log-prob chunk,
V vocabulary rows on one rank, b bytes of the compute dtype.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from mpo_megatron.config import ExpertsConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.config.model import kept_chunks
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import Adapter, adapter_rules
from mpo_megatron.hf.live_engine import EngineMemory
from mpo_megatron.hf.quantization import BYTES_PER_WEIGHT
from mpo_megatron.plan.delta_net import delta_net_kept
from mpo_megatron.plan.parameters import (
    Part,
    Weight,
    adapter_weights,
    buffer_size,
    part_weights,
    stage_parts,
)
from mpo_megatron.plan.rows import RowCounts

GIB = 2**30
STATE_BYTES = 8
"""AdamW's two moments in float32."""
MASTER_BYTES = 4
"""Float32 master weights beside bf16 ones; float32 weights need none."""
LEAVING = 2
"""Layers whose activations are being transferred to or from host memory at the same time (`model.offload_layers`)."""
GRADIENT_BYTES = 4
"""Gradients are summed and reduced in float32."""
INDEX_BYTES = 8
"""Token ids, positions and indices are int64."""


@dataclass(frozen=True, kw_only=True)
class Kernels:
    """The kernels in use: they decide which tensors autograd keeps."""

    layers: Literal["transformer_engine", "local"]
    attention: Literal["sdpa", "flex", "varlen"]
    gpu: bool
    """On a CPU nothing is fused: norms and SwiGLU keep intermediate results. Attention is by blocks in place of `sdpa`."""


@dataclass(frozen=True, kw_only=True)
class MemoryLayout:
    """Everything besides the row that determines memory."""

    shape: Family
    """The model."""
    padded_vocab: int
    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    world_size: int
    kernels: Kernels
    resident: bool
    """A reference model stays in memory beside the policy, for token-wise divergences."""
    sampler: EngineMemory | None = None
    """The engine that samples from the policy between steps, on its busiest GPU (`online.kl_weight`)."""
    routing: ExpertsConfig = field(default_factory=ExpertsConfig)
    """Additional work of experts' routers."""
    records_choices: bool = False
    """The reference's expert choices come from its cache."""
    adapter: Adapter | None = None
    """Adapter trained on frozen weights."""
    gpu_bytes: int | None = None
    """Memory of a GPU, which determines the log-prob kernel's chunks; None on a CPU."""

    @property
    def replicas(self) -> int:
        """Data-parallel size."""
        parallel = self.parallel
        return self.world_size // (parallel.tensor * parallel.pipeline * parallel.context)

    @property
    def sharing(self) -> int:
        """Ranks with the same weights, which shard optimizer states."""
        return self.replicas * self.parallel.context

    @property
    def expert_sharing(self) -> int:
        """Ranks with the same experts."""
        parallel = self.parallel
        return self.world_size // (parallel.pipeline * parallel.expert * parallel.expert_tensor)

    @property
    def dtype_bytes(self) -> int:
        """b: bytes per element."""
        return 2 if self.model.precision == "bf16" else 4

    @property
    def linear_input_bytes(self) -> int:
        """Bytes per element that a matrix product keeps of its input."""
        return self.dtype_bytes if self.model.fp8 == "none" else 1

    @property
    def keeps_normalized(self) -> bool:
        """Whether norms keep their normalized input for their weight's gradient: PyTorch's in bf16 on a CPU, unless frozen."""
        return not self.kernels.gpu and self.dtype_bytes < 4 and self.adapter is None

    @property
    def in_blocks(self) -> bool:
        """Whether frozen linear weights are stored in 4 bits, and dequantized only while they multiply."""
        return self.adapter is not None and self.adapter.quantize != "none"

    @property
    def sequence_parts(self) -> int:
        """s: number of parts into which sequence parallelism divides activations."""
        return self.parallel.tensor if self.parallel.sequence_parallel else 1

    @property
    def vocabulary(self) -> int:
        """V: vocabulary rows of one tensor-parallel rank."""
        return self.padded_vocab // self.parallel.tensor

    def recomputes(self, module: str) -> bool:
        """Whether a module of each layer is recomputed on its own."""
        return self.model.recompute == "selective" and module in self.model.recompute_modules


@dataclass(frozen=True, kw_only=True)
class StageMemory:
    """Peak bytes of a rank of one stage."""

    stage: int
    parameters: int
    """Elements, in Megatron's buffers."""
    trained: int
    """Elements with gradients: all, or the adapters'."""
    trained_experts: int
    """Those of them that belong to experts."""
    rows_in_flight: float
    """Rows whose activations are kept at the same time; with interleaving, sums of parts of rows."""
    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Kept by autograd for the backward passes of all rows in flight."""
    working: int
    """Added at the peak: see `moment`."""
    moment: str
    """The moment of the step with the peak."""
    log_probs: int
    """Memory of the log-prob head for one chunk; part of the peak only if it is the `moment`."""
    all_to_all: int
    """Send and receive buffers of context parallelism; likewise."""
    reference: int
    """Weights of a resident reference model."""
    asleep: int
    """Memory of a sampling engine between batches of samples."""
    sampling: int
    """Additional memory while it samples, when there are no activations."""
    overhead: int
    """CUDA context, communication buffers and workspaces, as configured."""

    @property
    def static(self) -> int:
        """Memory between two steps."""
        return self.weights + self.gradients + self.optimizer + self.reference + self.asleep

    @property
    def dynamic(self) -> int:
        """Additional memory at a step's peak, or while sampling if that is more."""
        return max(self.activations + self.working, self.sampling)

    @property
    def total(self) -> int:
        """Peak memory of the rank, in bytes."""
        return self.static + self.dynamic + self.overhead


def stage_memory(layout: MemoryLayout, stage: int, row: RowCounts, num_rows: int, overhead: int = 0) -> StageMemory:
    """Peak of a stage's rank if each of its rows is like `row`.

    Args:
        num_rows: rows per step and replica
        overhead: bytes used by the GPU's libraries
    """
    parts = stage_parts(layout.shape, layout.parallel)[stage]
    weights = [part_weights(layout.shape, layout.parallel, part, layout.padded_vocab) for part in parts]
    trained = weights
    if layout.adapter is not None:
        trained = [adapter_weights(layout.shape, layout.adapter, layout.parallel, part) for part in parts]
    dense = sum(buffer_size([w for w in part if not w.expert], layout.sharing) for part in trained)
    expert = sum(buffer_size([w for w in part if w.expert], layout.expert_sharing) for part in trained)
    frozen = 0 if layout.adapter is None else sum(weight.total for part in weights for weight in part)
    elements, stored = dense + expert + frozen, _weight_bytes(layout, weights, dense + expert + frozen)
    state_bytes = STATE_BYTES + (MASTER_BYTES if layout.dtype_bytes == 2 else 0)
    chunks = chunks_in_flight(layout.parallel, stage, num_rows)
    kept = chunks * max(_kept(layout, part, row) for part in parts) + _kept_by_head(layout, parts[-1], row)
    moment, working = _peak(layout, parts, row)
    sampler = layout.sampler if stage == 0 else None  # engines run beside the ranks of the first stage
    rows_bytes = INDEX_BYTES * (2 * row.tokens + 3 * row.scored) * num_rows + _choices(layout, row, num_rows)
    return StageMemory(
        stage=stage,
        parameters=elements,
        rows_in_flight=chunks / len(parts),
        weights=stored,
        trained=dense + expert,
        trained_experts=expert,
        gradients=(dense + expert) * GRADIENT_BYTES,
        optimizer=round(
            state_bytes * (dense // layout.sharing + expert // layout.expert_sharing) * (1 - layout.optimizer.cpu_offload)
        ),
        activations=kept,
        working=working + rows_bytes,
        moment=moment,
        log_probs=_head(layout, row) if parts[-1].last else 0,
        all_to_all=_all_to_all(layout, row),
        reference=elements * layout.dtype_bytes if layout.resident and not layout.model.resident_offload else 0,
        asleep=sampler.asleep if sampler else 0,
        sampling=sampler.awake - sampler.asleep if sampler else 0,
        overhead=overhead,
    )


def _choices(layout: MemoryLayout, row: RowCounts, num_rows: int) -> int:
    """The reference's recorded expert choices: those of a step on every rank, and again those of its own tokens."""
    experts = layout.shape.experts
    if experts is None or not layout.records_choices:
        return 0
    tokens = row.tokens * num_rows * layout.replicas + _tokens(layout, row) // layout.sequence_parts * num_rows
    return tokens * experts.choices * (1 if experts.id_bytes == 1 else 4)


def chunks_in_flight(parallel: ParallelConfig, stage: int, num_rows: int) -> int:
    """(row, virtual stage) pairs whose activations a stage holds at its peak.

    Narayanan et al. 2021 (arXiv:2104.04473, §2.2): 1F1B starts with one forward pass per following stage. Its interleaved form
    starts with two per following stage, and a full round per further virtual stage
    (megatron.core.pipeline_parallel.schedules: get_pp_rank_microbatches).
    """
    stages, runs = parallel.pipeline, parallel.virtual_pipeline
    warmup = stages - stage - 1 if runs == 1 else 2 * (stages - stage - 1) + (runs - 1) * stages
    return min(num_rows * runs, warmup + 1)


def _weight_bytes(layout: MemoryLayout, weights: list[list[Weight]], elements: int) -> int:
    """Stored weights: in 4 bits with scales; with FP8 plus quantized copies, row-wise and column-wise, a byte each."""
    matrices = sum(weight.total for part in weights for weight in part if weight.matrix)
    if layout.in_blocks:
        return round(matrices * BYTES_PER_WEIGHT) + layout.dtype_bytes * (elements - matrices)
    if layout.model.fp8 == "none":
        return elements * layout.dtype_bytes
    quantized = 2 * matrices
    return quantized + layout.dtype_bytes * (elements - (matrices if layout.model.fp8_params else 0))


# --------------------------------------------------------------------------------------------- kept for the backward pass


def _hidden(layout: MemoryLayout, row: RowCounts) -> int:
    """Elements of a residual on one rank: t·H / s."""
    return _tokens(layout, row) * layout.shape.hidden_size // layout.sequence_parts


def _tokens(layout: MemoryLayout, row: RowCounts) -> int:
    """t: tokens of a row on one context-parallel rank."""
    return row.tokens // layout.parallel.context


def _attention_widths(layout: MemoryLayout) -> tuple[int, int, int]:
    """(q, k, k') channels of one rank; k' includes key-value heads replicated for context parallelism."""
    shape, parallel = layout.shape, layout.parallel
    queries, keys = shape.queries // parallel.tensor, shape.keys // parallel.tensor
    repeated = max(keys, parallel.context * shape.head_dim) if parallel.context > 1 else keys
    return queries, keys, repeated


def _kept(layout: MemoryLayout, part: Part, row: RowCounts) -> int:
    """Bytes kept of one row by one virtual stage, without the head."""
    hidden, b = _hidden(layout, row), layout.dtype_bytes
    sent = 0 if part.last else hidden * b  # Megatron keeps what a stage sends
    if layout.model.recompute == "full":
        angles = _tokens(layout, row) * layout.shape.head_dim * 4
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
        return kept + _delta_net(layout, row, recomputed=layout.recomputes("core_attn"))
    kept += _projections_kept(layout, row)
    return kept if layout.recomputes("core_attn") else kept + _core_kept(layout, row)


def _delta_net(layout: MemoryLayout, row: RowCounts, *, recomputed: bool) -> int:
    """Bytes of a Gated DeltaNet, in place of attention's projections and core."""
    assert layout.shape.delta_net is not None
    return delta_net_kept(
        *(layout.shape.delta_net, layout.model),
        tokens=_tokens(layout, row),
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
    tokens, narrow = _tokens(layout, row), 0
    for rule in adapter_rules(layout.shape, layout.adapter):
        if not rule.megatron.endswith("lora_A") or (".mlp." in rule.megatron and (".experts." in rule.megatron) != experts):
            continue
        times = layout.shape.active_experts if rule.experts is not None else 1
        narrow += tokens * layout.adapter.rank * times // (layout.sequence_parts if rule.experts is not None else 1)
    return narrow * layout.dtype_bytes


def _second_half(layout: MemoryLayout, row: RowCounts, *, experts: bool) -> int:
    """Bytes of what follows the second norm: experts or a dense MLP."""
    return _moe_kept(layout, row) if experts else _mlp_kept(layout, row)


def _norms_kept(layout: MemoryLayout, row: RowCounts, *, experts: bool = False) -> int:
    """Two norms: input (the residual) and output (the next product's input); unfused also the normalized input, and 1 / rms.

    Transformer Engine fuses them into the following products, except the norm before experts.
    """
    tokens, b, engine = _tokens(layout, row), layout.dtype_bytes, layout.kernels.layers == "transformer_engine"
    hidden = _hidden(layout, row)
    output = hidden * (layout.linear_input_bytes + (b if layout.keeps_normalized else 0)) + 4 * tokens // layout.sequence_parts
    outputs = 2 * output
    if layout.recomputes("layernorm"):
        outputs -= int(experts) * output
    elif layout.recomputes("mlp") and not experts and engine:
        outputs -= output
    return 2 * hidden * b + outputs


def _projections_kept(layout: MemoryLayout, row: RowCounts) -> int:
    """Bytes around the attention core: queries, keys and values before and after norm and rotation, and the result."""
    shape, tokens, b = layout.shape, _tokens(layout, row), layout.dtype_bytes
    queries, keys, _ = _attention_widths(layout)
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


def _core_kept(layout: MemoryLayout, row: RowCounts) -> int:
    """Bytes within the attention core, all tokens of the row for this rank's heads: what its kernel keeps besides its inputs."""
    parallel, b = layout.parallel, layout.dtype_bytes
    queries, _, keys = (width // parallel.context for width in _attention_widths(layout))
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


def _mlp_kept(layout: MemoryLayout, row: RowCounts, ffn: int | None = None) -> int:
    """SwiGLU: gate and value as one tensor (2F), the product (F); on a CPU also the activated gate (F).

    Megatron-Core's own, used by shared experts (`ffn`), also keeps a copy of the value on a CPU.
    """
    width = layout.shape.intermediate_size // layout.parallel.tensor if ffn is None else ffn
    b = layout.dtype_bytes
    extra = 0 if layout.kernels.gpu else 1 if ffn is None else 2
    return _tokens(layout, row) * width * (2 * b + layout.linear_input_bytes + extra * b)


def _moe_kept(layout: MemoryLayout, row: RowCounts) -> int:
    """Experts, with tokens spread evenly: routing probabilities, the received tokens (H), and SwiGLU.

    Sorting, sending and summing keep only indices. On a CPU, SwiGLU keeps six tensors of F: gate and value, the activated gate,
    a copy of the value, and the product before and after the probabilities.
    """
    shape, parallel, b = layout.shape, layout.parallel, layout.dtype_bytes
    own = _tokens(layout, row) // layout.sequence_parts
    routed = own * shape.active_experts * parallel.expert_tensor
    inner = shape.expert_ffn // parallel.expert_tensor * (2 if layout.recomputes("moe_act") else 3 if layout.kernels.gpu else 6)
    routing = layout.routing  # logits and probabilities; the losses keep them again, with each token's load density
    maps = 3 + 2 * (routing.balance_coeff > 0) + (routing.z_coeff > 0)
    kept = own * shape.num_experts * 4 * maps + routed * b * (shape.hidden_size + inner)
    if shape.shared_ffn and not layout.recomputes("shared_experts"):
        kept += _mlp_kept(layout, row, shape.shared_ffn // parallel.tensor) + own * shape.hidden_size * b
    return kept


def _kept_by_head(layout: MemoryLayout, part: Part, row: RowCounts) -> int:
    """The final norm, the hidden states [S, H] of scored tokens, and five numbers of each."""
    if not part.last:
        return 0
    norm = _hidden(layout, row) * layout.dtype_bytes * (2 if layout.keeps_normalized else 1)
    scored = row.scored // layout.parallel.context
    return norm + scored * (layout.shape.hidden_size * layout.dtype_bytes + 5 * 4 + 2 * INDEX_BYTES + 1)


# ----------------------------------------------------------------------------------------------------- moments of a step


def _peak(layout: MemoryLayout, parts: tuple[Part, ...], row: RowCounts) -> tuple[str, int]:
    """The moment with the most allocated memory, and its bytes beyond what is kept for the backward pass."""
    moments = {"backward of an MLP": _backward(layout, row) - _kept_by_head(layout, parts[-1], row)}
    shape = layout.shape
    kinds = {(shape.has_experts(layer), shape.has_state(layer)) for part in parts for layer in part.layers}
    if layout.model.recompute == "full":
        again = max(layer_kept(layout, row, experts=experts, state=state) for experts, state in kinds)
        moments["backward of an MLP"] += again - _hidden(layout, row) * layout.dtype_bytes
    elif layout.model.recompute == "selective":
        moments["backward of an MLP"] += max(_recomputed(layout, row, experts=experts) for experts, _ in kinds)
        if layout.recomputes("core_attn"):
            gone = _kept_by_head(layout, parts[-1], row) + (0 if layout.recomputes("mlp") else _mlp_kept(layout, row))
            moments["backward of attention"] = (
                _core_kept(layout, row) + _tokens(layout, row) * sum(_attention_widths(layout)) * layout.dtype_bytes - gone
            )
            if any(state for _, state in kinds):
                moments["backward of a Gated DeltaNet"] = _delta_net(layout, row, recomputed=False) - gone
    if layout.parallel.context > 1:
        moments["all-to-all"] = moments["backward of an MLP"] - _backward(layout, row) - _mlp_kept(layout, row)
        moments["all-to-all"] += _all_to_all(layout, row)
    if parts[-1].last:
        moments["log-probs"] = _head(layout, row)
    if parts[0].first and layout.adapter is None:
        embedding = layout.padded_vocab // layout.parallel.tensor * layout.shape.hidden_size * layout.dtype_bytes
        done = _kept(layout, parts[0], row) + _kept_by_head(layout, parts[-1], row)
        moments["gradient of the embedding"] = (
            embedding + 2 * _tokens(layout, row) * layout.shape.hidden_size * layout.dtype_bytes - done
        )
    name = max(moments, key=lambda moment: moments[moment])
    return name, max(0, moments[name])


def _recomputed(layout: MemoryLayout, row: RowCounts, *, experts: bool) -> int:
    """Bytes of recomputed modules that exist again when the backward pass reaches a layer's second half."""

    def kept(modules: set[str]) -> int:
        model = dataclasses.replace(layout.model, recompute_modules=sorted(modules))  # type: ignore[arg-type]
        return layer_kept(dataclasses.replace(layout, model=model), row, experts=experts)

    return kept({"core_attn"}) - kept({"core_attn", *layout.model.recompute_modules})


def _backward(layout: MemoryLayout, row: RowCounts) -> int:
    """Backward of the MLP (of one expert's matrices): gradients of its output, its product or halves, and a weight."""
    shape, parallel, b = layout.shape, layout.parallel, layout.dtype_bytes
    tokens, hidden = _tokens(layout, row), _hidden(layout, row)
    if shape.num_experts:
        ffn = shape.expert_ffn // parallel.expert_tensor
        tokens = tokens // layout.sequence_parts * shape.active_experts * parallel.expert_tensor
        weight = shape.num_experts // parallel.expert * shape.hidden_size * ffn
    else:
        ffn = shape.intermediate_size // parallel.tensor
        weight = shape.hidden_size * ffn
    if layout.in_blocks:  # no gradient, but the dequantized weight, one expert at a time
        weight = shape.hidden_size * ffn
    elif layout.adapter is not None:  # no gradient of the weight
        weight = 0
    whole = tokens * shape.hidden_size
    output = hidden + (whole if layout.sequence_parts > 1 or shape.num_experts else 0)
    freed = 1 if layout.kernels.gpu else 4 if shape.num_experts else 2  # freed once the gradient [2F] exists
    gathered = whole if layout.sequence_parts > 1 else 0
    second = output + tokens * ffn + weight
    halves = output + 2 * tokens * ffn
    first = hidden + gathered + whole + 2 * weight - freed * tokens * ffn
    return b * max(second, halves, first)


def _head(layout: MemoryLayout, row: RowCounts) -> int:
    """A chunk's logits [C, V] in the compute dtype and in float32, and gradients of hidden states; or, after it, of all tokens.

    With a small vocabulary, the logits of more chunks are kept. In float32 on a CPU, their gradient overwrites them.
    """
    shape, b = layout.shape, layout.dtype_bytes
    scored = row.scored // layout.parallel.context
    chunk = min(layout.model.chunk(layout.vocabulary, layout.gpu_bytes), scored)
    logits = chunk * layout.vocabulary
    kept = min(scored, chunk * kept_chunks(chunk, layout.vocabulary)) if chunk else 0
    each = 4 + (2 * b if b < 4 else 4 if layout.kernels.gpu else 0)  # bf16: logits, float32 probabilities, the gradient
    if layout.resident:
        each += 2 * b + 8
    padded = layout.padded_vocab > shape.vocab_size and not layout.kernels.gpu
    working = logits * (each + (4 if padded else 0)) + (kept - chunk) * layout.vocabulary * b
    working += (chunk + scored) * shape.hidden_size * b
    spread = (_tokens(layout, row) + 2 * scored) * shape.hidden_size * b
    return max(working, spread)


def _all_to_all(layout: MemoryLayout, row: RowCounts) -> int:
    """Queries, keys and values: as sent, as received, and in row order."""
    if layout.parallel.context == 1:
        return 0
    queries, _, keys = _attention_widths(layout)
    return 3 * _tokens(layout, row) * (queries + 2 * keys) * layout.dtype_bytes

"""Bytes of one rank of a pipeline stage at the peak of a training step.

Static memory is exact: weights, gradients and optimizer states as Megatron-Core allocates them. What autograd keeps of a row
(kept.py) is added, and the largest of a few moments of the backward pass. docs/reference/planning.md gives the formulas and the
measurements. Legend: memory_layout.py.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mpo_megatron.config import ParallelConfig
from mpo_megatron.config.model import kept_chunks
from mpo_megatron.hf.quantization import BYTES_PER_WEIGHT
from mpo_megatron.plan.kept import core_kept, head_kept, layer_kept, mlp_kept, stage_kept, state_kept
from mpo_megatron.plan.memory_layout import GRADIENT_BYTES, INDEX_BYTES, MemoryLayout
from mpo_megatron.plan.parameters import Part, Weight, adapter_weights, buffer_size, part_weights, stage_parts
from mpo_megatron.plan.rows import RowCounts

STATE_BYTES = 8
"""AdamW's two moments in float32."""
MASTER_BYTES = 4
"""Float32 master weights beside bf16 ones; float32 weights need none."""


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
        trained = [adapter_weights(layout.shape, layout.adapter, layout.parallel, part, layout.padded_vocab) for part in parts]
    dense = sum(buffer_size([w for w in part if not w.expert], layout.sharing) for part in trained)
    expert = sum(buffer_size([w for w in part if w.expert], layout.expert_sharing) for part in trained)
    frozen = 0 if layout.adapter is None else sum(weight.total for part in weights for weight in part)
    elements, stored = dense + expert + frozen, _weight_bytes(layout, weights, dense + expert + frozen)
    state_bytes = STATE_BYTES + (MASTER_BYTES if layout.dtype_bytes == 2 else 0)
    chunks = chunks_in_flight(layout.parallel, stage, num_rows)
    kept = chunks * max(stage_kept(layout, part, row) for part in parts) + head_kept(layout, parts[-1], row)
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
    tokens = row.tokens * num_rows * layout.replicas + layout.tokens(row) // layout.sequence_parts * num_rows
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


# ----------------------------------------------------------------------------------------------------- moments of a step


def _peak(layout: MemoryLayout, parts: tuple[Part, ...], row: RowCounts) -> tuple[str, int]:
    """The moment with the most allocated memory, and its bytes beyond what is kept for the backward pass."""
    moments = {"backward of an MLP": _backward(layout, row) - head_kept(layout, parts[-1], row)}
    shape = layout.shape
    kinds = {(shape.has_experts(layer), shape.has_state(layer)) for part in parts for layer in part.layers}
    if layout.model.recompute == "full":
        again = max(layer_kept(layout, row, experts=experts, state=state) for experts, state in kinds)
        moments["backward of an MLP"] += again - layout.hidden(row) * layout.dtype_bytes
    elif layout.model.recompute == "selective":
        moments["backward of an MLP"] += max(_recomputed(layout, row, experts=experts) for experts, _ in kinds)
        if layout.recomputes("core_attn"):
            gone = head_kept(layout, parts[-1], row) + (0 if layout.recomputes("mlp") else mlp_kept(layout, row))
            moments["backward of attention"] = (
                core_kept(layout, row) + layout.tokens(row) * sum(layout.attention_widths) * layout.dtype_bytes - gone
            )
            if any(state for _, state in kinds):
                moments["backward of a Gated DeltaNet"] = state_kept(layout, row, recomputed=False) - gone
    if layout.parallel.context > 1:
        moments["all-to-all"] = moments["backward of an MLP"] - _backward(layout, row) - mlp_kept(layout, row)
        moments["all-to-all"] += _all_to_all(layout, row)
    if parts[-1].last:
        moments["log-probs"] = _head(layout, row)
    if parts[0].first and layout.adapter is None:
        embedding = layout.padded_vocab // layout.parallel.tensor * layout.shape.hidden_size * layout.dtype_bytes
        done = stage_kept(layout, parts[0], row) + head_kept(layout, parts[-1], row)
        moments["gradient of the embedding"] = (
            embedding + 2 * layout.tokens(row) * layout.shape.hidden_size * layout.dtype_bytes - done
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
    tokens, hidden = layout.tokens(row), layout.hidden(row)
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
    working += (chunk + scored) * (shape.hidden_size + layout.head_rank) * b
    if layout.head_rank:  # the gradient of B, summed in float32
        working += layout.vocabulary * layout.head_rank * (4 if b == 4 else 4 + b)
    spread = (layout.tokens(row) + 2 * scored) * shape.hidden_size * b
    return max(working, spread)


def _all_to_all(layout: MemoryLayout, row: RowCounts) -> int:
    """Queries, keys and values: as sent, as received, and in row order."""
    if layout.parallel.context == 1:
        return 0
    queries, _, keys = layout.attention_widths
    return 3 * layout.tokens(row) * (queries + 2 * keys) * layout.dtype_bytes

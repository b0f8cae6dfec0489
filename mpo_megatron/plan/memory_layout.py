"""What memory depends on besides the row: model, layout, precision, kernels.

Legend of all memory formulas: T tokens of a row, t = T / context tokens on one rank, s ranks that shard norms and residuals
(sequence parallelism), H hidden, q, k channels of queries and keys on one rank, F MLP channels on one rank, S scored tokens, C
tokens of a log-prob chunk, V vocabulary rows on one rank, b bytes of the compute dtype.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from mpo_megatron.config import ExpertsConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import OUTPUT_LAYER, Adapter
from mpo_megatron.hf.live_engine import EngineMemory
from mpo_megatron.plan.rows import RowCounts

GIB = 2**30
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
    def head_rank(self) -> int:
        """Rank of the output layer's adapter; 0 without one."""
        return self.adapter.rank if self.adapter is not None and OUTPUT_LAYER in self.adapter.target_modules else 0

    @property
    def sequence_parts(self) -> int:
        """s: number of parts into which sequence parallelism divides activations."""
        return self.parallel.tensor if self.parallel.sequence_parallel else 1

    @property
    def vocabulary(self) -> int:
        """V: vocabulary rows of one tensor-parallel rank."""
        return self.padded_vocab // self.parallel.tensor

    @property
    def attention_widths(self) -> tuple[int, int, int]:
        """(q, k, k') channels of one rank; k' includes key-value heads replicated for context parallelism."""
        parallel = self.parallel
        queries, keys = self.shape.queries // parallel.tensor, self.shape.keys // parallel.tensor
        repeated = max(keys, parallel.context * self.shape.head_dim) if parallel.context > 1 else keys
        return queries, keys, repeated

    def tokens(self, row: RowCounts) -> int:
        """t: tokens of a row on one context-parallel rank."""
        return row.tokens // self.parallel.context

    def hidden(self, row: RowCounts) -> int:
        """Elements of a residual on one rank: t·H / s."""
        return self.tokens(row) * self.shape.hidden_size // self.sequence_parts

    def recomputes(self, module: str) -> bool:
        """Whether a module of each layer is recomputed on its own."""
        return self.model.recompute == "selective" and module in self.model.recompute_modules

"""The cost of a layout, and the layouts that fit, fastest first."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

from mpo_megatron.config import (
    ConfigError,
    DataConfig,
    ExpertsConfig,
    ModelConfig,
    OnlineConfig,
    OptimizerConfig,
    ParallelConfig,
)
from mpo_megatron.config.parallel import check_ranks
from mpo_megatron.families import Family
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.hf.flops import FlopModel
from mpo_megatron.hf.fp8 import token_multiple, validate_fp8_layout
from mpo_megatron.hf.layout import validate_layout
from mpo_megatron.hf.live_engine import EngineMemory, engine_memory, validate_engine_layout
from mpo_megatron.hf.quantization import check_blocks
from mpo_megatron.hf.recompute import validate_recompute
from mpo_megatron.plan.hardware import Hardware
from mpo_megatron.plan.memory import StageMemory, stage_memory
from mpo_megatron.plan.memory_layout import GIB, Kernels, MemoryLayout
from mpo_megatron.plan.parameters import count_parameters
from mpo_megatron.plan.rows import PackedSteps, Sequences
from mpo_megatron.plan.step_time import Assumptions, Clock, StepTime

ROW_TOKENS = (2048, 4096, 8192, 16384, 32768)
"""Token budgets to try."""
EMBEDDED_BATCH = 32
"""Responses that the embedded engine generates in one batch."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One layout, and its cost."""

    model: ModelConfig
    parallel: ParallelConfig
    row_tokens: int
    stages: tuple[StageMemory, ...]
    packed: PackedSteps
    time: StepTime
    replicas: int

    @property
    def worst(self) -> StageMemory:
        """The stage with the most memory."""
        return max(self.stages, key=lambda stage: stage.total)

    def describe(self) -> str:
        """The layout as text."""
        parallel = self.parallel
        sizes = {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "expert": parallel.expert,
            "data": self.replicas,
        }
        words = " × ".join(f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data")
        return f"{words}, recompute {self.model.recompute}, rows of {self.row_tokens:,} tokens"


@dataclass(frozen=True, kw_only=True)
class Placed:
    """A layout with its rows and stage memory: everything its time depends on besides hardware and assumptions."""

    layout: MemoryLayout
    packed: PackedSteps
    stages: tuple[StageMemory, ...]


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run without its layout."""

    family: Family
    padded_vocab: int
    model: ModelConfig
    data: DataConfig
    optimizer: OptimizerConfig
    sequences: Sequences
    flops: FlopModel
    kernels: Kernels
    resident: bool
    online: OnlineConfig
    routing: ExpertsConfig
    caches_reference: bool
    """The reference's log-probs are computed before the first step."""
    records_choices: bool
    adapter: Adapter | None
    gpus: int
    hardware: Hardware
    assumed: Assumptions
    overhead_gib: float
    usable: float

    @property
    def limit(self) -> int:
        """Bytes that a run may use on a GPU, including the overhead."""
        return round((self.overhead_gib + (self.hardware.memory_gib - self.overhead_gib) * self.usable) * GIB)

    @property
    def samples(self) -> bool:
        """Whether an engine samples from the policy between steps."""
        return self.online.kl_weight > 0

    def sampler(self, replicas: int) -> EngineMemory | None:
        """Memory of the engine on its busiest training GPU; None if nothing samples there."""
        if not self.samples or self.online.engine == "server" or self.online.vllm.gpus == "own":
            return None
        sequences = -(-self.online.num_samples // replicas)
        need = engine_memory(
            self.family,
            self.online.vllm,
            parameters=count_parameters(self.family),
            dtype_bytes=2 if self.model.precision == "bf16" else 4,
            sequences=sequences if self.online.engine == "vllm" else min(sequences, EMBEDDED_BATCH),
            tokens=self.sequences.longest_prompt + self.online.max_tokens,
        )
        return need if self.online.engine == "vllm" else dataclasses.replace(need, asleep=0, working=0)  # freed between batches

    def evaluate(self, parallel: ParallelConfig, recompute: str, row_tokens: int, gpus: int | None = None) -> Candidate:
        """Memory and time of one layout.

        Raises: as `place`.
        """
        placed = self.place(parallel, recompute, row_tokens, gpus)
        return Candidate(
            model=placed.layout.model,
            parallel=parallel,
            row_tokens=row_tokens,
            stages=placed.stages,
            packed=placed.packed,
            time=self.price(placed),
            replicas=placed.layout.replicas,
        )

    def price(self, placed: Placed) -> StepTime:
        """Time of a step on a layout."""
        assumed = self.assumed
        if placed.packed.split_groups and not assumed.forward_only:
            assumed = dataclasses.replace(assumed, forward_only=True)
        return Clock(placed.layout, self.flops, self.hardware, assumed).step(placed.packed, placed.stages)

    def place(self, parallel: ParallelConfig, recompute: str, row_tokens: int, gpus: int | None = None) -> Placed:
        """Rows and memory of one layout.

        Raises:
            ConfigError: the layout divides neither the model nor the ranks evenly.
            PackingError: a response does not fit into a row.
        """
        gpus = gpus or self.gpus
        check_ranks(parallel, gpus)
        validate_layout(self.family, parallel, self.padded_vocab)
        if self.samples:
            validate_engine_layout(self.online.vllm, parallel, self.family)
        validate_fp8_layout(self.model, parallel, self.family)
        if self.adapter is not None and self.adapter.quantize != "none":
            check_blocks(self.family, parallel)
        model = self.model.with_recompute(recompute)
        validate_recompute(model, parallel, self.family, from_engine=self.kernels.layers == "transformer_engine")
        layout = MemoryLayout(
            shape=self.family,
            padded_vocab=self.padded_vocab,
            model=model,
            parallel=parallel,
            optimizer=self.optimizer,
            world_size=gpus,
            kernels=self.kernels,
            resident=self.resident,
            sampler=self.sampler(gpus // (parallel.tensor * parallel.pipeline * parallel.context)),
            routing=self.routing,
            records_choices=self.records_choices,
            adapter=self.adapter,
            gpu_bytes=round(self.hardware.memory_gib * GIB),
        )
        packed = self.sequences.pack(
            row_tokens=row_tokens,
            replicas=layout.replicas,
            multiple=token_multiple(model) * parallel.row_parts,
            rows_multiple=parallel.rows_multiple,
            layout=self.data.layout,
            pair_weight=self.flops.pair_weight,
            window=self.flops.window,
        )
        row, num_rows = packed.full_row(row_tokens), max(len(step[0]) for step in packed.rows)
        overhead = round(self.overhead_gib * GIB)
        stages = tuple(stage_memory(layout, stage, row, num_rows, overhead) for stage in range(parallel.pipeline))
        return Placed(layout=layout, packed=packed, stages=stages)

    def fits(self, candidate: Candidate) -> bool:
        """Whether it fits on every rank."""
        return candidate.worst.total <= self.limit


def search(problem: Workload, gpus: int | None = None) -> list[Candidate]:
    """Layouts that fit, fastest first; only the fastest of those that differ merely in virtual stages or recomputation."""
    found = [candidate for candidate in candidates(problem, gpus) if problem.fits(candidate)]
    best: dict[tuple[ParallelConfig, int], Candidate] = {}
    for candidate in sorted(found, key=lambda candidate: (round(candidate.time.seconds, 3), candidate.worst.total)):
        best.setdefault((dataclasses.replace(candidate.parallel, virtual_pipeline=1), candidate.row_tokens), candidate)
    return list(best.values())


def candidates(problem: Workload, gpus: int | None = None) -> Iterator[Candidate]:
    """Every layout that divides model and ranks: tensor parallelism within a machine, at least one group per replica."""
    gpus = gpus or problem.gpus
    shape = problem.family
    rows = [size for size in ROW_TOKENS if size >= problem.sequences.longest] or [problem.sequences.longest]
    for parallel in layouts(shape, gpus, problem.hardware.gpus_per_node):
        replicas = gpus // (parallel.tensor * parallel.pipeline * parallel.context)
        if replicas > problem.data.groups_per_step:
            continue
        try:
            validate_layout(problem.family, parallel, problem.padded_vocab)
            validate_fp8_layout(problem.model, parallel, problem.family)
            if problem.adapter is not None and problem.adapter.quantize != "none":
                check_blocks(problem.family, parallel)
        except ConfigError:
            continue
        for row_tokens in rows:
            for recompute in ("none", "selective", "full"):
                candidate = problem.evaluate(parallel, recompute, row_tokens, gpus)
                yield candidate
                if problem.fits(candidate):
                    break  # more recomputation would only be slower


def layouts(shape: Family, gpus: int, gpus_per_node: int) -> Iterator[ParallelConfig]:
    """Sizes whose product divides the GPUs; ignores the model's limits."""
    for tensor in (size for size in _divisors(min(gpus, gpus_per_node)) if gpus % size == 0):
        for pipeline in (size for size in _divisors(gpus // tensor) if shape.num_hidden_layers % size == 0):
            for context in _divisors(gpus // (tensor * pipeline), most=8):
                for runs in _divisors(shape.num_hidden_layers // pipeline, most=4) if pipeline > 1 else (1,):
                    for expert in _expert_sizes(shape, gpus // pipeline):
                        yield ParallelConfig(
                            tensor=tensor, pipeline=pipeline, virtual_pipeline=runs, context=context, expert=expert
                        )


def _divisors(number: int, most: int | None = None) -> list[int]:
    return [size for size in range(1, min(number, most or number) + 1) if number % size == 0]


def _expert_sizes(shape: Family, ranks: int) -> list[int]:
    if not shape.num_experts:
        return [1]
    return [size for size in _divisors(shape.num_experts, most=64) if ranks % size == 0]

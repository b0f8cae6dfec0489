"""Seconds of a training step: matrix products at a given share of the GPU's peak, and exposed communication.

Operations come from the trainer's own FLOP model. Volumes: tensor and sequence parallelism, Korthikanti et al. 2022 (§4.2.2);
pipelines and their bubble, Narayanan et al. 2021 (§2.2, §3.2); data parallelism with sharded optimizer states, Rajbhandari et al.
2020 (arXiv:1910.02054, §7). It is an estimate: kernels, networks and stragglers vary
(assumptions: docs/reference/planning.md).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from mpo_megatron.hf.flops import BACKWARD, FlopModel
from mpo_megatron.plan.hardware import Hardware
from mpo_megatron.plan.memory import StageMemory
from mpo_megatron.plan.memory_layout import GRADIENT_BYTES, MemoryLayout
from mpo_megatron.plan.parameters import stage_parts
from mpo_megatron.plan.rows import PackedSteps, RowCounts
from mpo_megatron.plan.traffic import head_traffic, layer_traffic, weight_traffic

TIMES = ("compute", "elementwise", "tensor", "context", "expert", "pipeline", "bubble", "data", "update")
"""Parts of a step's time."""
UPDATE_BYTES = 34
"""Bytes of device memory that AdamW moves per weight: reads gradient, master weight and moments, writes the last three and the
weight, and reads the gradient again for its norm."""


@dataclass(frozen=True, kw_only=True)
class Assumptions:
    """Quantities that cannot be derived."""

    efficiency: float
    """Share of the peak that bf16 matrix products and attention reach."""
    fp8_efficiency: float
    """Share of the FP8 peak that FP8 matrix products reach."""
    memory_efficiency: float
    """Share of the device memory's bandwidth that element-wise kernels reach."""
    network_efficiency: float
    """Share of a link's bandwidth that collectives reach."""
    latency_us: float
    """Microseconds before a collective's first byte."""
    forward_only: bool
    """A pass without gradients comes first: two-phase steps, or a resident reference."""
    deduplicated: bool = False
    """Tokens go to each machine once, however many of their experts it has, as DeepEP and HybridEP do."""
    overlapped: frozenset[str] = frozenset()
    """Communication hidden by computation, of `tensor`, `context` and `expert`. The trainer overlaps none of these."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """Seconds of a step, and GB that a rank sends in it."""

    compute: float
    """Matrix products of the slowest stage, recomputation included."""
    recompute: float
    """The part of `compute` spent on recomputation."""
    elementwise: float
    """Memory-bound kernels: norms, rotary embedding, SwiGLU, casts to FP8, sorting of tokens by expert."""
    tensor: float
    """Exposed: reductions and gathers of tensor and sequence parallelism."""
    context: float
    """Exposed: all-to-alls of context parallelism."""
    expert: float
    """Exposed: all-to-alls between tokens and experts."""
    pipeline: float
    """Exposed: activations and gradients between stages."""
    bubble: float
    """Waiting while the pipeline fills and drains."""
    data: float
    """Exposed: gradients to their owners, weights back."""
    update: float
    """AdamW's update, in seconds."""
    volumes: dict[str, float]
    """GB that the busiest rank sends, by purpose."""
    model_flops: float
    """Operations of the model, over all ranks, without recomputation."""
    forward_seconds: float
    """A pass over the step's rows without gradients, as for reference log-probs."""

    @property
    def seconds(self) -> float:
        """The whole step."""
        return sum(getattr(self, name) for name in TIMES)

    @property
    def bubble_share(self) -> float:
        """Share of the pipeline's time that its stages wait."""
        busy = self.compute + self.elementwise + self.tensor + self.context + self.expert + self.pipeline
        return self.bubble / (self.bubble + busy)


@dataclass(frozen=True, kw_only=True)
class _Stage:
    """Seconds of all rows of a replica on one stage."""

    forward: float = 0.0
    backward: float = 0.0
    recompute: float = 0.0
    elementwise: float = 0.0
    tensor: float = 0.0
    context: float = 0.0
    expert: float = 0.0
    pipeline: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    @property
    def forward_total(self) -> float:
        """A forward pass without gradients, with half of the step's element-wise kernels and communication as an upper bound."""
        return self.forward + (self.elementwise + self.tensor + self.context + self.expert + self.pipeline) / 2


class Clock:
    """Times of one layout on given hardware."""

    def __init__(self, layout: MemoryLayout, flops: FlopModel, hardware: Hardware, assumed: Assumptions) -> None:
        self.layout, self.flops, self.hardware, self.assumed = layout, flops, hardware, assumed
        self.layers = layout.parallel.stage_layers(layout.shape.num_hidden_layers)
        parts = stage_parts(layout.shape, layout.parallel)
        self.expert_layers = [sum(layout.shape.has_experts(n) for part in own for n in part.layers) for own in parts]
        self.traffic = {experts: layer_traffic(layout, experts=experts) for experts in (False, True)}

    def step(self, packed: PackedSteps, memory: Sequence[StageMemory]) -> StepTime:
        """The mean of the sampled steps."""
        times = [self._step(sums, len(step[0]), memory) for sums, step in zip(packed.sums, packed.rows, strict=True)]
        names = [field.name for field in fields(StepTime) if field.name != "volumes"]
        means = {name: sum(getattr(time, name) for time in times) / len(times) for name in names}
        volumes = {name: sum(time.volumes[name] for time in times) / len(times) for name in times[0].volumes}
        return StepTime(volumes=volumes, **means)

    def _step(self, replicas: tuple[RowCounts, ...], num_rows: int, memory: Sequence[StageMemory]) -> StepTime:
        """Seconds of a step. Costs are linear in a row's counts: rows of a replica are summed, and all wait for the busiest
        replica."""
        rows = max(replicas, key=self._work)
        stages = [self.rows(rows, num_rows, stage, memory[stage].trained) for stage in range(self.layout.parallel.pipeline)]
        slowest = max(range(len(stages)), key=lambda stage: stages[stage].total)
        own, runs = stages[slowest], self.layout.parallel.virtual_pipeline
        others = [stage for number, stage in enumerate(stages) if number != slowest]
        bubble = sum(stage.total for stage in others) / num_rows / runs
        forward = own.forward_total + sum(stage.forward_total for stage in others) / num_rows / runs
        extra = forward if self.assumed.forward_only else 0.0
        return StepTime(
            compute=(own.forward + own.backward + own.recompute) + extra,
            recompute=own.recompute + extra,
            elementwise=own.elementwise,
            tensor=own.tensor,
            context=own.context,
            expert=own.expert,
            pipeline=own.pipeline,
            bubble=bubble,
            data=self._data(memory[slowest], last_row=own.backward / num_rows),
            update=self._update(memory[slowest]),
            volumes=self._volumes(rows, num_rows, slowest, memory[slowest]),
            model_flops=float(
                self.flops.train_step(
                    tokens=sum(row.tokens for row in replicas),
                    pairs=sum(row.pairs for row in replicas),
                    scored=sum(row.scored for row in replicas),
                )
            ),
            forward_seconds=forward,
        )

    def _work(self, row: RowCounts) -> int:
        return self.flops.train_step(tokens=row.tokens, pairs=row.pairs, scored=row.scored)

    def rows(self, row: RowCounts, num_rows: int, stage: int, trained: int) -> _Stage:
        """Seconds of forward and backward passes over rows with these total counts, on a stage that never waits.

        Args:
            trained: number of a rank's weights with gradients
        """
        layout, parallel = self.layout, self.layout.parallel
        last = stage == parallel.pipeline - 1
        ranks = parallel.tensor * parallel.context
        rate = self.hardware.bf16_tflops * 1e12 * self.assumed.efficiency * ranks
        linear_rate = rate
        if layout.model.fp8 != "none" and self.hardware.fp8_tflops:
            linear_rate = self.hardware.fp8_tflops * 1e12 * self.assumed.fp8_efficiency * ranks
        share = self.layers[stage] / layout.shape.num_hidden_layers
        linear = share * self.flops.per_token * row.tokens / linear_rate
        core = share * self.flops.per_pair * row.pairs / rate
        head = self.flops.per_scored * row.scored / rate if last else 0.0
        again = {"none": 0.0, "selective": self._again(linear, core), "full": linear + core}[layout.model.recompute] + head
        own = _Stage(
            forward=linear + core + head,
            backward=BACKWARD * core + self.flops.backward * (linear + head),
            recompute=again,
            elementwise=self._elementwise(row, num_rows, stage, trained),
        )
        return replace(own, **self._exchanges(row, num_rows, stage, busy=own.total))

    def _elementwise(self, row: RowCounts, num_rows: int, stage: int, trained: int) -> float:
        """Seconds of memory traffic outside of matrix products; recomputed layers count again."""
        layout, sparse = self.layout, self.expert_layers[stage]
        again = 1 if layout.model.recompute == "full" else 0
        moved = 0.0
        for experts, layers in ((False, self.layers[stage] - sparse), (True, sparse)):
            traffic = self.traffic[experts]
            moved += layers * ((1 + again) * traffic.forward + traffic.backward)
        moved *= row.tokens / layout.parallel.context
        if stage == layout.parallel.pipeline - 1:
            moved += head_traffic(layout) * row.scored / layout.parallel.context
        moved += num_rows * weight_traffic(trained)
        return moved / (self.hardware.memory_gbps * 1e9 * self.assumed.memory_efficiency)

    def _exchanges(self, row: RowCounts, num_rows: int, stage: int, busy: float) -> dict[str, float]:
        """Seconds that a stage waits for other ranks while it computes rows, by purpose.

        Args:
            busy: seconds of computation that can hide overlapped communication
        """
        seconds = {}
        for name, (volume, count) in self._row_volumes(row, num_rows, stage).items():
            sent = self._scattered(volume) if name == "expert" else volume * 1e9 / self._bytes_per_second(name)
            seconds[name] = sent + count * self.assumed.latency_us * 1e-6
        overlapped = {name for name in seconds if name in self.assumed.overlapped}
        if self.layout.parallel.virtual_pipeline > 1:  # Megatron's interleaved schedule sends while it computes
            overlapped.add("pipeline")
        hidden = sum(seconds[name] for name in overlapped)
        remains = max(0.0, 1 - busy / hidden) if hidden else 0.0
        return {name: time * (remains if name in overlapped else 1.0) for name, time in seconds.items()}

    def _scattered(self, volume: float) -> float:
        """Seconds to send this many GB of tokens to experts, within a machine and to others concurrently.

        With `deduplicated`, a token reaches each other machine with any of its experts once, and is copied there.
        """
        parallel, hardware = self.layout.parallel, self.hardware
        ranks = parallel.expert * parallel.expert_tensor
        machines = max(1, ranks // hardware.gpus_per_node)
        rate = self.assumed.network_efficiency * 1e9
        if machines == 1:
            return volume * 1e9 / (hardware.intra_gbps * rate)
        elsewhere = (ranks - hardware.gpus_per_node) / max(1, ranks - 1)  # share of what this rank sends that leaves the machine
        copies = self.layout.shape.active_experts
        reached = (
            (machines - 1) * (1 - (1 - 1 / machines) ** copies) if self.assumed.deduplicated else copies * (1 - 1 / machines)
        )
        outside = volume * elsewhere * reached / (copies * (1 - 1 / machines))
        within = volume if self.assumed.deduplicated else volume * (1 - elsewhere)
        return max(outside / hardware.inter_gbps, within / hardware.intra_gbps) * 1e9 / rate

    def _again(self, linear: float, core: float) -> float:
        """Seconds of recomputed modules; norms and activations are negligible beside matrix products."""
        layout, shape = self.layout, self.layout.shape
        sparse = sum(self.expert_layers) / shape.num_hidden_layers
        attention = 2 * (shape.queries + shape.keys)  # multiply-adds a token, in units of the hidden size
        dense, experts, shared = 3 * shape.intermediate_size, 3 * shape.expert_ffn * shape.active_experts, 3 * shape.shared_ffn
        total = attention + (1 - sparse) * dense + sparse * (experts + shared)
        found = core if layout.recomputes("core_attn") else 0.0
        found += linear * (1 - sparse) * dense / total if layout.recomputes("mlp") else 0.0
        if layout.recomputes("moe"):
            return found + linear * sparse * (experts + shared) / total
        return found + (linear * sparse * shared / total if layout.recomputes("shared_experts") else 0.0)

    def _row_volumes(self, row: RowCounts, num_rows: int, stage: int) -> dict[str, tuple[float, int]]:
        """GB that a rank sends for rows, and the number of messages; forward, backward and recomputation."""
        layout, shape, parallel = self.layout, self.layout.shape, self.layout.parallel
        layers, b = self.layers[stage], layout.dtype_bytes
        tokens = row.tokens // parallel.context
        hidden = tokens * shape.hidden_size * b / 1e9
        again = 1 if layout.model.recompute == "full" else 0
        half = 0.5 if layout.recomputes("mlp") or layout.recomputes("moe") else again
        tensor, expert = (0.0, 0), (0.0, 0)
        if parallel.tensor > 1:
            # With sequence parallelism: a gather and a scatter around each half of a layer; backward the same, and inputs
            # gathered again for the weights' gradients. Without it: two reductions each way, each with the volume of a gather and
            # a scatter. Experts need no gather, so theirs is half of that.
            halves = layers - self.expert_layers[stage] / 2
            count = round(halves * (4 + 6 + 4 * half if parallel.sequence_parallel else 2 * (2 + 2 + 2 * half)))
            tensor = (count * hidden * (parallel.tensor - 1) / parallel.tensor, count * num_rows)
        context = (0.0, 0)
        if parallel.context > 1:
            queries, keys = shape.queries // parallel.tensor, shape.keys // parallel.tensor
            widths = 2 * queries + 2 * max(keys, parallel.context * shape.head_dim)
            passes = 2 + (again or int(layout.recomputes("core_attn")))
            sent = tokens * widths * b / 1e9 * (parallel.context - 1) / parallel.context
            context = (layers * passes * sent, 2 * layers * passes * num_rows)
        if parallel.expert > 1:
            own = tokens // layout.sequence_parts * shape.active_experts
            sent = own * shape.hidden_size * b / 1e9 * (parallel.expert - 1) / parallel.expert
            passes = 2 * (2 + (again or int(layout.recomputes("moe"))))
            expert = (self.expert_layers[stage] * passes * sent, self.expert_layers[stage] * passes * num_rows)
        # An inner stage receives and sends, forward and backward, for each virtual stage.
        borders = (stage > 0) + (stage < parallel.pipeline - 1)
        if parallel.virtual_pipeline > 1:
            borders = 2
        messages = 2 * borders * parallel.virtual_pipeline if parallel.pipeline > 1 else 0
        return {
            "tensor": tensor,
            "context": context,
            "expert": expert,
            "pipeline": (messages / 2 * hidden / layout.sequence_parts, messages * num_rows),
        }

    def _volumes(self, rows: RowCounts, num_rows: int, stage: int, memory: StageMemory) -> dict[str, float]:
        total = {name: volume for name, (volume, _) in self._row_volumes(rows, num_rows, stage).items()}
        return {
            **total,
            "gradients": self._exchanged(memory) * GRADIENT_BYTES / 1e9,
            "weights": self._exchanged(memory) * self._gathered_bytes() / 1e9,
        }

    def _exchanged(self, memory: StageMemory) -> float:
        """Number of weights whose gradients a rank sends: all except its own shard; for experts, among ranks with the same
        ones."""
        dense, experts = memory.trained - memory.trained_experts, memory.trained_experts
        sharing, expert_sharing = self.layout.sharing, self.layout.expert_sharing
        return dense * (sharing - 1) / sharing + experts * (expert_sharing - 1) / expert_sharing

    def _gathered_bytes(self) -> int:
        return 1 if self.layout.model.fp8_params else self.layout.dtype_bytes

    def _data(self, memory: StageMemory, last_row: float) -> float:
        """Reduce-scatter of gradients and all-gather of weights, minus what `optimizer.overlap` hides."""
        rate, exchanged = self._bytes_per_second("data"), self._exchanged(memory)
        scatter, gather = exchanged * GRADIENT_BYTES / rate, exchanged * self._gathered_bytes() / rate
        overlap = self.layout.optimizer.overlap
        if overlap != "none":  # plans are for GPUs, where `auto` means `all`
            scatter = max(0.0, scatter - last_row)
        if overlap in ("auto", "all"):
            gather = max(0.0, gather - last_row / BACKWARD)
        return scatter + gather

    def _update(self, memory: StageMemory) -> float:
        layout, experts = self.layout, memory.trained_experts
        owned = (memory.trained - experts) / layout.sharing + experts / layout.expert_sharing
        moved = owned * UPDATE_BYTES + memory.gradients  # zeroed before each step
        return moved / (self.hardware.memory_gbps * 1e9)

    def _bytes_per_second(self, kind: str) -> float:
        """Ranks are ordered tensor, context, data, pipeline: a group crosses machines if its span exceeds one."""
        parallel, world = self.layout.parallel, self.layout.world_size
        span = {
            "tensor": parallel.tensor,
            "context": parallel.tensor * parallel.context,
            "expert": max(parallel.tensor, parallel.expert * parallel.expert_tensor),
            "data": world // parallel.pipeline,
            "pipeline": world,
        }[kind]
        hardware = self.hardware
        gbps = hardware.intra_gbps
        if span > hardware.gpus_per_node:
            # Rings enter and leave a machine once, each through another member's adapter.
            members = max(1, hardware.gpus_per_node // parallel.tensor) if kind == "data" else 1
            gbps = min(gbps, members * hardware.inter_gbps)
        return gbps * 1e9 * self.assumed.network_efficiency

"""Options of a run's layout: the partition of the model over ranks, and whether layers and ranks divide evenly."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class ParallelConfig(Section, prefix="parallel."):
    """Partition of the model over ranks; the remaining ranks are data-parallel replicas."""

    tensor: int = 1
    """Tensor-parallel ranks: each holds a shard of every weight matrix."""
    pipeline: int = 1
    """Pipeline stages: each holds consecutive layers."""
    virtual_pipeline: int = 1
    """Virtual stages per pipeline stage; more than 1 interleaves them, which divides the pipeline's bubble by this number."""
    first_stage_layers: int | None = None
    """Layers of the first stage, if not an equal share: fewer compensate for the embedding, or for an odd number of layers."""
    last_stage_layers: int | None = None
    """Layers of the last stage, if not an equal share: fewer compensate for the output layer."""
    context: int = 1
    """Context-parallel ranks: each computes a part of every row's tokens, and some of the heads in attention."""
    expert: int = 1
    """Expert-parallel ranks, for models with experts: each holds some of every layer's experts. They are taken from the ranks of
    one pipeline stage, so they multiply no other size."""
    expert_tensor: int = 1
    """Ranks that shard the same expert; rarely useful, because experts are small."""
    sequence: bool | None = None
    """Sequence parallelism in norms and residuals; by default on when `tensor` > 1."""
    timeout_minutes: float = 30.0
    """Fail if a collective hangs for longer than this."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("tensor", "pipeline", "virtual_pipeline", "context", "expert", "expert_tensor"):
            require(getattr(self, name) >= 1, f"parallel.{name} = {getattr(self, name)}; it must be at least 1.")
        require(
            0 < self.timeout_minutes < math.inf,
            f"parallel.timeout_minutes = {self.timeout_minutes}; it must be positive, and finite.",
        )
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline = {self.virtual_pipeline} needs parallel.pipeline > 1; remove it, or raise "
            "parallel.pipeline.",
        )
        for name in ("first_stage_layers", "last_stage_layers"):
            layers = getattr(self, name)
            require(layers is None or layers >= 1, f"parallel.{name} = {layers}; a stage has at least 1 layer.")
            require(
                layers is None or self.pipeline > 1,
                f"parallel.{name} = {layers} needs parallel.pipeline > 1; remove it, or raise parallel.pipeline.",
            )
        require(
            not (self.sequence and self.tensor == 1),
            "parallel.sequence = true needs parallel.tensor > 1; remove it, or raise parallel.tensor.",
        )

    @property
    def sequence_parallel(self) -> bool:
        """Whether sequence parallelism is on."""
        return self.tensor > 1 if self.sequence is None else self.sequence

    @property
    def row_parts(self) -> int:
        """Maximum number of equal parts that a row's tokens are split into; row lengths are multiples of it."""
        return self.tensor * self.context

    @property
    def rows_multiple(self) -> int:
        """The number of rows per replica is a multiple of this: interleaved schedules run rows in rounds of one per stage."""
        return self.pipeline if self.virtual_pipeline > 1 else 1

    def stage_layers(self, num_layers: int) -> tuple[int, ...]:
        """Layers of each pipeline stage, over all its virtual stages.

        Raises:
            ConfigError: `num_layers` cannot be divided like this; names valid values.
        """
        first, last, stages = self.first_stage_layers, self.last_stage_layers, self.pipeline
        middle_stages = stages - (first is not None) - (last is not None)
        middle = num_layers - (first or 0) - (last or 0)
        given = ", ".join(
            f"parallel.{name} = {layers}"
            for name, layers in (("first_stage_layers", first), ("last_stage_layers", last))
            if layers
        )
        if middle_stages == 0:
            require(
                middle == 0,
                f"{given}: together {num_layers - middle} layers, but the model has num_hidden_layers = {num_layers}; "
                "remove one.",
            )
        elif given:
            require(
                middle > 0 and middle % middle_stages == 0,
                f"{given} leave {middle} of num_hidden_layers = {num_layers} layers for the other {middle_stages} stages of "
                f"parallel.pipeline = {stages}; leave them a multiple of {middle_stages}, at least {middle_stages}.",
            )
        else:
            choices = ", ".join(str(n) for n in range(1, num_layers + 1) if num_layers % n == 0)
            require(
                num_layers % stages == 0,
                f"parallel.pipeline = {stages} does not divide the model's num_hidden_layers = {num_layers}; choose one of "
                f"{choices}, or give the first or last stage another number of layers (parallel.first_stage_layers, "
                "parallel.last_stage_layers).",
            )
        share = middle // middle_stages if middle_stages else 0
        layers = [share] * stages
        layers[0] = first or share
        layers[-1] = last or layers[-1]
        for stage, number in enumerate(layers):
            choices = ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
            require(
                number % self.virtual_pipeline == 0,
                f"parallel.virtual_pipeline = {self.virtual_pipeline} does not divide the {number} layers of stage {stage} of "
                f"parallel.pipeline = {stages}; choose one of {choices}.",
            )
        return tuple(layers)


def check_ranks(parallel: ParallelConfig, world_size: int) -> None:
    """Raise `ConfigError` unless the model-parallel sizes divide the number of ranks."""
    sizes = (parallel.tensor, parallel.pipeline, parallel.context)
    model_ranks = math.prod(sizes)
    require(
        world_size % model_ranks == 0,
        f"parallel.tensor × parallel.pipeline × parallel.context = {' × '.join(map(str, sizes))} = {model_ranks} does not "
        f"divide the number of ranks, {world_size}; start a multiple of {model_ranks} ranks (torchrun --nproc-per-node).",
    )
    stage_ranks, experts = world_size // parallel.pipeline, parallel.expert * parallel.expert_tensor
    choices = [n for n in range(1, stage_ranks + 1) if stage_ranks % n == 0]
    require(
        stage_ranks % experts == 0,
        f"parallel.expert × parallel.expert_tensor = {parallel.expert} × {parallel.expert_tensor} = {experts} does not divide "
        f"the {stage_ranks} ranks of a pipeline stage ({world_size} ranks, parallel.pipeline = {parallel.pipeline}); choose a "
        f"product of {', '.join(map(str, choices))}.",
    )

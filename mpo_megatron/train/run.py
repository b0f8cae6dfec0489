"""Everything one training run works with: opened, loaded and cut over ranks, before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_megatron.config import TrainConfig
from mpo_megatron.data.loader import RowShape, StepBatch
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.hf.flops import FlopModel, build_flop_model
from mpo_megatron.hf.fp8 import token_multiple
from mpo_megatron.model.architecture import use_transformer_engine
from mpo_megatron.model.attention_backends import choose_attention
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import optimizer
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.faults.stopping import Deadline
from mpo_megatron.train.faults.supervisor import STEP_SEEDS
from mpo_megatron.train.inputs import Inputs
from mpo_megatron.train.metrics import Mean, compute_metrics
from mpo_megatron.train.objective import Logps, group_batch
from mpo_megatron.train.reference import ReferenceLogps, cache_key, reference_logps
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.step import prepare_schedules


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one run works with."""

    config: TrainConfig
    inputs: Inputs
    references: dict[Path, ReferenceLogps]
    ranks: Ranks
    shape: RowShape
    flops: FlopModel
    model: list[Any]
    resident: Resident | None
    """The reference model, for losses that compare whole distributions with it."""

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)

    def reference(self, data: PreparedGroups, batch: StepBatch) -> Logps:
        """Reference log-probs of a batch."""
        return self.references[data.path].select(batch.table)

    def generator(self, step: int) -> torch.Generator:
        """Generator of what a loss draws at a step; the same on every rank."""
        return torch.Generator().manual_seed(self.config.seed + STEP_SEEDS * step)

    def measure(self, batch: StepBatch, policy: Logps, reference: Logps) -> tuple[dict[str, Mean], torch.Tensor]:
        """Metrics of a step from the log-probs of all its responses, and the loss of each group [G]; the same on every rank."""
        groups = group_batch(batch.table, policy, reference, generator=self.generator(batch.step))
        losses = self.inputs.objective.compute(groups).detach()
        contributes, computed = torch.from_numpy(batch.contributes), torch.from_numpy(batch.in_rows)
        return compute_metrics(groups, losses, contributes, computed, self.inputs.objective.params), losses


def open_run(config: TrainConfig, inputs: Inputs, ranks: Ranks) -> Run:
    """Load the models, compute what is missing of the reference's log-probs; all ranks call it.

    Raises:
        ConfigError: a checkpoint does not fit or is damaged.
        DataError: the reference's log-probs cannot be written.
        Stopped: asked to stop in the pass over the reference's log-probs; what is computed is written.
    """
    flops = build_flop_model(inputs.family)
    shape = build_row_shape(config, ranks, flops)
    policy = build_policy(inputs.family, config.model, config.parallel, ranks, inputs.padded_vocab_size)
    references = compute_references(config, inputs, policy, ranks, shape)
    checkpoint.load_weights(policy, config.model.checkpoint, ranks)
    model = optimizer.wrap_data_parallel(policy, config.optimizer, ranks)
    prepare_schedules(model)
    return Run(
        config=config,
        inputs=inputs,
        references=references,
        ranks=ranks,
        shape=shape,
        flops=flops,
        model=model,
        resident=load_reference_model(config, inputs, ranks, shape) if inputs.objective.needs.token_kl else None,
    )


def build_row_shape(config: TrainConfig, ranks: Ranks, flops: FlopModel) -> RowShape:
    """How this rank's rows are cut: the same for training, evaluation and the reference."""
    return RowShape(
        row_tokens=config.data.row_tokens,
        layout=config.data.layout,
        multiple=token_multiple(config.model) * config.parallel.row_parts,
        num_replicas=ranks.data_size,
        replica=ranks.data_rank,
        pair_weight=flops.pair_weight,
        window=flops.window,
        rows_multiple=config.parallel.rows_multiple,
    )


def load_reference_model(config: TrainConfig, inputs: Inputs, ranks: Ranks, shape: RowShape) -> Resident:
    """The reference model in memory, without gradients, cut over ranks as the policy is."""
    parts = build_policy(inputs.family, config.model, config.parallel, ranks, inputs.padded_vocab_size)
    checkpoint.load_weights(parts, config.model.reference or config.model.checkpoint, ranks)
    return Resident(parts, offload=config.model.resident_offload)


def compute_references(
    config: TrainConfig, inputs: Inputs, policy: list[torch.nn.Module], ranks: Ranks, shape: RowShape
) -> dict[Path, ReferenceLogps]:
    """Reference log-probs of the training and held-out groups, by folder; the policy lends its memory to the reference model.

    Losses without a reference get them too: margins, log-ratios and KL mean the same for every method then.

    Raises:
        Stopped: asked to stop; what is computed is written.
    """
    loaded, deadline = False, Deadline(config.faults)

    def load_reference() -> list[torch.nn.Module]:
        nonlocal loaded
        if not loaded:
            checkpoint.load_weights(policy, config.model.reference or config.model.checkpoint, ranks)
            loaded = True
        return policy

    references = {}
    for data in (inputs.train, inputs.held_out):
        if data is not None:
            key = cache_key(
                inputs.reference_digest,
                data,
                config.model,
                transformer_engine=use_transformer_engine(config.model),
                attention=choose_attention(config.model),
            )
            references[data.path] = reference_logps(
                data,
                data.path / "reference" / key,
                load_reference,
                ranks,
                shape,
                groups_per_part=config.data.groups_per_step,
                tokens=inputs.objective.needs.tokens,
                deadline=deadline,
            )
    return references

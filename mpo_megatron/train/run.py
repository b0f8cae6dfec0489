"""Everything a training run needs before its first step, opened, loaded and partitioned over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mpo_megatron.config import TrainConfig
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.data.loader import RowShape, StepBatch
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.model.adapters import adapters_off
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.train import optimizer
from mpo_megatron.train.adapting import start_adapters
from mpo_megatron.train.faults.supervisor import STEP_SEEDS
from mpo_megatron.train.metrics import Mean, compute_metrics
from mpo_megatron.train.objective import Logps, group_batch
from mpo_megatron.train.reference_cache import ReferenceLogps
from mpo_megatron.train.resident import AdapterOff, Resident
from mpo_megatron.train.routing import Recorder, StepRouting
from mpo_megatron.train.session import Session
from mpo_megatron.train.setup import Setup
from mpo_megatron.train.step import forward_step, prepare_schedules


@dataclass(frozen=True, kw_only=True)
class Run:
    """Everything one run works with."""

    session: Session
    references: dict[Path, ReferenceLogps]
    """Log-probs of the training and held-out groups, by folder; empty with `model.reference: adapter_off`, or if not needed."""
    model: list[Any]
    """The policy's parts, with gradient buffers."""
    resident: Resident | None
    """The reference model, for losses that compare whole distributions with it."""

    @property
    def setup(self) -> Setup:
        """What is known before anything is loaded."""
        return self.session.setup

    @property
    def config(self) -> TrainConfig:
        """The configuration, with every choice resolved."""
        return self.session.setup.config

    @property
    def ranks(self) -> Ranks:
        """This rank's position, and its process groups."""
        return self.session.ranks

    @property
    def shape(self) -> RowShape:
        """The shape of this rank's rows."""
        return self.session.shape

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.session.setup.folder

    def reference(self, data: PreparedGroups, batch: StepBatch, routing: StepRouting | None = None) -> Logps | None:
        """Reference log-probs of a batch: from the cache, or from the model with its adapter off; None if not needed. All ranks
        call it.

        Args:
            routing: receives the reference's expert choices, if needed and made in this pass
        """
        if data.path in self.references:
            return self.references[data.path].select(batch.table)
        if not self.setup.needs_reference:
            return None
        recorder = None
        if routing is not None and routing.config.needs_choices and self.resident is None:
            recorder = Recorder(routing.config, routing.experts, batch, self.ranks)
        with adapters_off(self.model):
            logps = forward_step(self.model, batch, self.setup.objective, self.ranks, routing=recorder)
        if routing is not None and recorder is not None:
            routing.choices = recorder.choices
        return logps

    def routing(self, data: PreparedGroups, batch: StepBatch) -> StepRouting | None:
        """The routers' inputs for a batch, or None. All ranks call it."""
        settings, experts, choices = self.config.experts, self.setup.family.experts, self.session.choices.get(data.path)
        if experts is None or not (settings.has_terms or settings.needs_choices or self.resident is not None):
            return None
        chosen = None if choices is None else choices.select(batch.table, self.ranks)
        return StepRouting(settings, experts, batch, self.ranks, chosen)

    def generator(self, step: int) -> torch.Generator:
        """Generator for a loss's draws at a step; the same on every rank."""
        return torch.Generator().manual_seed(self.config.seed + STEP_SEEDS * step)

    def losses(self, batch: StepBatch, policy: Logps, reference: Logps | None) -> torch.Tensor:
        """[G] loss of each group of a batch outside training steps; the same on every rank."""
        groups = group_batch(batch.table, policy, reference, generator=self.generator(batch.step))
        return self.setup.objective.compute(groups).detach()

    def measure(self, batch: StepBatch, policy: Logps, reference: Logps | None, losses: torch.Tensor) -> dict[str, Mean]:
        """Metrics of a batch from the log-probs of all its responses and the losses [G]; the same on every rank."""
        groups = group_batch(batch.table, policy, reference)
        contributes, computed = torch.from_numpy(batch.contributes), torch.from_numpy(batch.in_rows)
        return compute_metrics(groups, losses, contributes, computed, self.setup.objective.params)


def open_run(session: Session) -> Run:
    """Load the models, and compute missing reference log-probs; all ranks call it.

    Raises:
        ConfigError: a checkpoint does not fit or is damaged.
        DataError: the reference's log-probs cannot be written.
        Stopped: a stop was requested during the reference pass; results so far are on disk.
    """
    setup = session.setup
    references = {} if setup.config.model.reference == ADAPTER_OFF else session.references()
    parts = session.load(setup.model_folder)
    start_adapters(parts, setup, session.ranks)
    model = optimizer.wrap_data_parallel(parts, setup.config.optimizer, session.ranks)
    prepare_schedules(model)
    resident = reference_model(session, model) if setup.objective.needs.token_kl else None
    return Run(session=session, references=references, model=model, resident=resident)


def reference_model(session: Session, model: list[Any]) -> Resident:
    """The reference model beside the policy: the policy with its adapter off if equivalent, otherwise a second model."""
    if not session.setup.adapter_off_is_reference:
        return session.resident()
    return AdapterOff(model, replay=session.setup.config.experts.routing == "replay")

"""A run before it starts: its inputs opened, its open choices resolved, everything checked, once per process.

The command line builds a `Setup` before it starts ranks, so that an error is reported once, not once per rank. Each rank builds
the same setup from the same command line; `session` (session.py) then gives it its part of the models.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from mpo_megatron import starting
from mpo_megatron.config import TrainConfig, validate_experts, validate_folders
from mpo_megatron.config.loss_names import check_loss_names
from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.config.parallel import check_ranks
from mpo_megatron.data.loader import indices_of_steps
from mpo_megatron.train.checkpoints.course import check_early

if TYPE_CHECKING:
    from mpo_megatron.data.arrays import Int64
    from mpo_megatron.data.store import PreparedGroups
    from mpo_megatron.families import Family
    from mpo_megatron.families.adapters import Adapter
    from mpo_megatron.hf.adapter import AdapterRecord
    from mpo_megatron.hf.flops import FlopModel
    from mpo_megatron.train.objective import Objective


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What every rank of a run knows before any weight is loaded."""

    given: TrainConfig
    """The configuration as the user wrote it, with Megatron checkpoints; saved, because the run may resume on another machine."""
    config: TrainConfig
    """The same, with choices resolved that depend on machine and layout: layers, attention, overlap, sequence parallelism."""
    num_ranks: int
    family: Family
    padded_vocab_size: int
    model_digest: str
    reference_digest: str
    train: PreparedGroups
    held_out: PreparedGroups | None
    objective: Objective
    total_steps: int
    record: AdapterRecord | None = None
    """The trained adapter and its base model; None if all weights are trained."""

    @property
    def adapter(self) -> Adapter | None:
        """The shape of the trained adapter."""
        return None if self.record is None else self.record.adapter

    @property
    def adapter_off_is_reference(self) -> bool:
        """Whether the policy with its adapter off is the reference model, however configured."""
        return self.record is not None and self.record.base_digest == self.reference_digest

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.output)

    @property
    def model_folder(self) -> Path:
        """The checkpoint from which training starts."""
        return Path(self.config.model.checkpoint)

    @property
    def reference_folder(self) -> Path:
        """The checkpoint of the reference; by default, the one from which training starts."""
        if self.record is not None and self.config.model.reference == ADAPTER_OFF:
            return Path(self.record.base)
        return Path(self.config.model.reference or self.config.model.checkpoint)

    @property
    def last_step(self) -> int:
        """The step at which this start of the run ends."""
        return min(self.total_steps, self.config.stop_after or self.total_steps)

    @property
    def needs_reference(self) -> bool:
        """Whether the run needs the reference's log-probs."""
        from mpo_megatron.train.objective import needs_reference

        return needs_reference(self.objective, self.config, self.family.experts)

    @property
    def reached_groups(self) -> Int64:
        """Indices of the training groups in the steps up to `last_step`, in order, including steps before a resumption."""
        data = self.config.data
        num_steps = self.last_step - data.first_step
        return indices_of_steps(num_steps, len(self.train), data.groups_per_step, seed=self.config.seed, shuffle=data.shuffle)

    @functools.cached_property
    def flops(self) -> FlopModel:
        """Operations of a step."""
        from mpo_megatron.hf.flops import build_flop_model

        return build_flop_model(self.family, frozen=self.adapter is not None)


def build_setup(config: TrainConfig, num_ranks: int | None = None, *, resumes: bool = False) -> Setup:
    """Open a run's inputs, resolve its open choices, and check that everything fits together.

    Cheap checks come first: a wrong path, option or layout is reported without importing torch and Megatron-Core. A Hugging Face
    folder is converted.

    Args:
        num_ranks: ranks of the whole run; by default one per GPU of this machine, or what the layout needs
        resumes: whether the run may resume: then compare it with its newest checkpoint as early as possible
    Raises:
        ConfigError: names the field, the rule and the fix.
    """
    check_loss_names(config.loss)
    validate_folders(config)
    check_early(config, resumes=resumes)
    num_ranks, family, padded_vocab_size = read_layout(config, num_ranks)
    validate_experts(config.experts, num_experts=family.num_experts, loss_step=config.loss.step)
    with starting.imports():
        from mpo_megatron.model.checkpoint_folder import with_megatron_checkpoints
        from mpo_megatron.train.inputs import open_inputs
        from mpo_megatron.train.objective import build_objective

    objective = build_objective(config.loss)
    given = replace(config, model=with_megatron_checkpoints(config.model, Path(config.output)))
    return open_inputs(given, num_ranks, family, padded_vocab_size, objective)


def check_contrasts(setup: Setup) -> None:
    """Refuse training groups without a contrast to learn from, and held-out groups without one to measure.

    Raises:
        ConfigError: naming the data and the loss.
    """
    from mpo_megatron.train.objective import check_contrast

    for name, data in (("data.train", setup.train), ("data.eval", setup.held_out)):
        if data is not None:
            check_contrast(setup.objective, data, name)


def read_layout(config: TrainConfig, num_ranks: int | None = None) -> tuple[int, Family, int]:
    """Number of ranks, the model, and its padded vocabulary size, after checking that the layout divides the model.

    Raises:
        ConfigError: it does not, or a file is missing or damaged.
    """
    with starting.imports():
        from mpo_megatron.hf.layout import read_model
        from mpo_megatron.train.launcher import count_ranks

    num_ranks = num_ranks or count_ranks(config.parallel)
    check_ranks(config.parallel, num_ranks)
    return num_ranks, *read_model(Path(config.model.checkpoint), config.parallel)

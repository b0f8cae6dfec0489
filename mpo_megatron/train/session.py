"""A working rank: its process groups, its part of the models, and the reference's log-probs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path

import torch

from mpo_megatron.config.model import ADAPTER_OFF
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.model.parallel import Ranks, model_parallel
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.adapting import load_model
from mpo_megatron.train.choices import ReferenceChoices
from mpo_megatron.train.faults.spreading import spreading_requests
from mpo_megatron.train.faults.stopping import Deadline
from mpo_megatron.train.reference import reference_logps
from mpo_megatron.train.reference_cache import ReferenceLogps, cache_key
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.row_shape import build_row_shape
from mpo_megatron.train.setup import Setup


@contextlib.contextmanager
def session(setup: Setup) -> Iterator[Session]:
    """Connect the ranks, and disconnect at the end; within it, requests to stop reach all ranks. All ranks call it."""
    with model_parallel(setup.config.parallel, setup.config.seed) as ranks, spreading_requests():
        yield Session(setup, ranks)


class Session:
    """What a rank works with."""

    def __init__(self, setup: Setup, ranks: Ranks) -> None:
        self.setup, self.ranks = setup, ranks
        self.shape = build_row_shape(setup.config, setup.flops, num_replicas=ranks.data_size, replica=ranks.data_rank)

    @functools.cached_property
    def parts(self) -> list[torch.nn.Module]:
        """This rank's parts of the model; `load` fills their weights."""
        return self._build()

    def load(self, folder: Path) -> list[torch.nn.Module]:
        """The parts with a checkpoint's weights; all ranks call it.

        Raises:
            ConfigError: the checkpoint does not fit or is damaged.
        """
        load_model(self.parts, folder, self.setup.record, self.ranks)
        return self.parts

    @functools.cached_property
    def choices(self) -> dict[Path, ReferenceChoices]:
        """The reference's recorded expert choices, by data folder; at the first call, all ranks read them together.

        Empty if not needed, or if a resident reference keeps its choices in memory.
        """
        setup, experts = self.setup, self.setup.family.experts
        in_memory = setup.objective.needs.token_kl or setup.config.model.reference == ADAPTER_OFF
        if experts is None or not setup.config.experts.needs_choices or in_memory:
            return {}
        datasets = [data for data in (setup.train, setup.held_out) if data is not None]
        return {data.path: ReferenceChoices.open(self._cache(data), data, experts, self.ranks) for data in datasets}

    def references(self, *, whole: bool = False) -> dict[Path, ReferenceLogps]:
        """Reference log-probs of the training and held-out groups, by folder; afterwards the parts hold the reference's weights.

        Covers only training groups that the run reaches; empty if the run needs no reference.

        Args:
            whole: compute all groups, including those that the run does not reach
        Raises:
            DataError: the log-probs cannot be written.
            Stopped: a stop was requested; results so far are on disk.
        """
        setup, config = self.setup, self.setup.config
        if not (whole or setup.needs_reference):
            return {}
        load, deadline = functools.cache(lambda: self.load(setup.reference_folder)), Deadline(config.faults)
        return {
            data.path: reference_logps(
                data,
                self._cache(data),
                load,
                self.ranks,
                self.shape,
                groups_per_pass=config.data.groups_per_step,
                tokens=setup.objective.needs.tokens,
                deadline=deadline,
                wanted=setup.reached_groups if data is setup.train and not whole else None,
                choices=self.choices.get(data.path),
            )
            for data in (setup.train, setup.held_out)
            if data is not None
        }

    def resident(self) -> Resident:
        """The reference model in memory beside the policy, without gradients, partitioned like the policy."""
        parts = self._build()
        load_model(parts, self.setup.reference_folder, self.setup.record, self.ranks)
        config = self.setup.config
        return Resident(parts, offload=config.model.resident_offload, replay=config.experts.routing == "replay")

    def _cache(self, data: PreparedGroups) -> Path:
        """Folder of the reference's cached results for these groups."""
        adapter = self.setup.adapter
        quantize = "none" if adapter is None else adapter.quantize
        model = self.setup.config.model
        key = cache_key(self.setup.reference_digest, data, model, adapted=adapter is not None, quantize=quantize)
        return data.path / "reference" / key

    def _build(self) -> list[torch.nn.Module]:
        config = self.setup.config
        setup = self.setup
        return build_policy(setup.family, config.model, config.parallel, self.ranks, setup.padded_vocab_size, setup.adapter)

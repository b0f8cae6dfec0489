"""The loss of a run with its hyper-parameters, and its input from a step's table.

Legend: G groups of a step, K responses of a group, T scored tokens of the longest response.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.config import ConfigError, LossConfig, TrainConfig
from mpo_megatron.data.arrays import Bools
from mpo_megatron.data.loader import GroupTable
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.families.family import Experts
from mpo_megatron.files.functions import find_function
from mpo_megatron.losses import GroupBatch, build_params, get_loss
from mpo_megatron.losses.own import adopt, try_out
from mpo_megatron.losses.registry import Loss, Needs


@dataclass(frozen=True, kw_only=True)
class Logps:
    """Log-probs of a step's responses, the same on every rank; 0 where a response was not computed."""

    response: Tensor
    """[G, K] log π(y | x) in nats, float64."""
    token: Tensor | None = None
    """[G, K, T] log π of each scored token, for token-level losses."""
    kl: Tensor | None = None
    """[G, K] KL(π ‖ π_ref) over the vocabulary, summed over a response's tokens, for losses that regularise with it."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """A loss with its hyper-parameters."""

    loss: Loss
    params: Any
    needs: Needs

    def select(self, table: GroupTable) -> tuple[Bools, Bools]:
        """(contributes [G], scored [G, K]): the groups and responses that the loss needs; from rewards and labels only."""
        batch = group_batch(table, Logps(response=torch.zeros(table.valid.shape)), None)
        return self.loss.contributes(batch, self.params).numpy(), self.loss.scored(batch, self.params).numpy()

    def compute(self, batch: GroupBatch) -> Tensor:
        """[G] loss of each group in nats; 0 for a group without contrast."""
        return self.loss.compute(batch, self.params)

    @property
    def needs_whole_batch(self) -> bool:
        """Whether the loss needs all groups of a step at once, and so cannot be computed row by row."""
        return self.needs.batch_statistics or self.needs.sampled


def build_objective(config: LossConfig) -> Objective:
    """The run's loss.

    Raises:
        ConfigError: an unknown loss or hyper-parameter, or a step mode that the loss does not support.
    """
    loss = find_loss(config)
    try:
        params = build_params(loss.name, config.params)
    except ValueError as error:
        raise ConfigError(f"loss.params.{str(error).removeprefix(f'{loss.name}.')}") from error
    if config.function is not None:
        try:
            try_out(loss, params)
        except ValueError as error:
            raise ConfigError(f"loss.function = {config.function}: {error}") from error
    objective = Objective(loss=loss, params=params, needs=loss.needs(params))
    if config.step == "fused" and objective.needs_whole_batch:
        raise ConfigError(
            f"loss.step = fused; {loss.name} needs the whole global batch at once; set loss.step to auto or two_phase."
        )
    return objective


def needs_reference(objective: Objective, config: TrainConfig, experts: Experts | None) -> bool:
    """Whether a run needs the reference's log-probs: for the loss, for metrics, or because expert choices come with them."""
    choices = experts is not None and config.experts.needs_choices and not objective.needs.token_kl
    return objective.needs.reference or config.logging.reference_metrics or choices


def find_loss(config: LossConfig) -> Loss:
    """The configured loss: a method of the table, or a user's function.

    Raises:
        ConfigError: it does not exist, or importing its file fails.
    """
    if config.function is None:
        try:
            return get_loss(config.name)
        except ValueError as error:
            raise ConfigError(f"loss.name = {str(error).removeprefix('loss = ')}") from error
    function = find_function("loss.function", config.function)
    try:
        return adopt(function, config.title)
    except ValueError as error:
        raise ConfigError(f"loss.function = {config.function}: {error}") from error


def check_data(objective: Objective, *, has_rewards: bool, has_labels: bool, where: str) -> None:
    """Refuse data that lacks what the loss reads.

    Raises:
        ConfigError: names the loss, what is missing, and the fix.
    """
    name, needs = objective.loss.name, objective.needs
    if needs.rewards and not has_rewards:
        raise ConfigError(
            f"loss.name = {name} reads rewards, but {where} has chosen / rejected labels only; prepare data with rewards, or use "
            "partition: labels or a pairwise loss."
        )
    if needs.labels and not has_labels:
        raise ConfigError(
            f"loss.name = {name} with {objective.params} reads chosen / rejected labels, but {where} has none; "
            "choose another partition."
        )


CHECKED_GROUPS = 4096
"""Number of groups checked at a time for a contrast."""


def check_contrast(objective: Objective, data: PreparedGroups, name: str) -> None:
    """Refuse data from which the loss cannot learn.

    Raises:
        ConfigError: no group contributes.
    """
    offsets = data.response_offsets()
    values = {"rewards": data.all_rewards(), "labels": data.all_labels()}
    for first in range(0, len(data), CHECKED_GROUPS):
        ends = offsets[first : first + CHECKED_GROUPS + 1]
        valid = torch.arange(int(np.diff(ends).max())) < torch.from_numpy(np.diff(ends))[:, None]
        given: dict[str, Any] = {}
        for field, flat in values.items():
            if flat is not None:
                own = torch.from_numpy(flat[ends[0] : ends[-1]].copy())
                given[field] = torch.zeros(valid.shape, dtype=own.dtype).masked_scatter(valid, own)
        batch = GroupBatch(policy_logps=torch.zeros(valid.shape), valid=valid, **given)
        if objective.loss.contributes(batch, objective.params).any():
            return
    raise ConfigError(
        f"{name} = {data.path}: for loss.name = {objective.loss.name} with {objective.params} none of its {len(data):,} groups "
        "has preferred and other responses, so there is nothing to learn from; change loss.params, or prepare other groups."
    )


def group_batch(
    table: GroupTable, policy: Logps, reference: Logps | None, *, generator: torch.Generator | None = None
) -> GroupBatch:
    """The table as input of the losses, on the device of `policy`."""
    device = policy.response.device

    def take(values: Any, dtype: torch.dtype) -> Tensor | None:
        return None if values is None else torch.as_tensor(values).to(device=device, dtype=dtype)

    valid = take(table.valid, torch.bool)
    assert valid is not None
    return GroupBatch(
        policy_logps=policy.response,
        reference_logps=None if reference is None else take(reference.response, torch.float64),
        rewards=take(table.rewards, torch.float64),
        labels=take(table.labels, torch.int8),
        valid=valid,
        lengths=take(table.scored_lengths, torch.int64),
        token_logps=policy.token,
        token_kl=policy.kl,
        reference_token_logps=None if reference is None else take(reference.token, torch.float32),
        generator=generator,
    )


def take_groups(batch: GroupBatch, slots: Tensor) -> GroupBatch:
    """These groups [g] of a batch, in this order; `slots` is on the batch's device."""
    fields = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    taken: dict[str, Any] = {name: value[slots] if isinstance(value, Tensor) else value for name, value in fields.items()}
    return GroupBatch(**taken)

"""Steps of training data: deterministic, sharded over replicas, prefetched, and a function of the step number alone.

Every rank knows the whole step (its groups, their rewards and lengths) but builds only its own replica's rows. A step's content
depends on the seed, the step and the global batch size, not on the number of ranks. So a resumed run, even on another layout,
sees the same data.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from mpo_megatron.data.arrays import Bools, Float64, Int64
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.packing import PromptLayout, Row, RowPlan, build_row, plan_rows
from mpo_megatron.data.store import PreparedGroups


@dataclass(frozen=True, kw_only=True)
class GroupTable:
    """The step's groups as padded matrices, the same on every rank. G groups, K the largest number of responses."""

    indices: Int64
    """[G] index of each group in the dataset."""
    group_ids: tuple[str, ...]
    """[G] the groups' ids."""
    valid: Bools
    """[G, K] False where a group has fewer responses than K."""
    rewards: Float64 | None
    """[G, K] rewards, 0 where not valid; None if the data has labels only."""
    labels: npt.NDArray[np.int8] | None
    """[G, K] 1 chosen, 0 rejected, −1 neither or not valid; None if the data has none."""
    lengths: Int64
    """[G, K] tokens of each response, its end token included."""
    scored_lengths: Int64
    """[G, K] tokens whose log-probs are summed for a response, at least 1: all except tokens that the model did not generate
    (tool results), and except the first one if the prompt is empty."""
    prompt_lengths: Int64
    """[G] tokens of each prompt."""


@dataclass(frozen=True, kw_only=True)
class StepBatch:
    """The data of one optimizer step, or of one evaluation step."""

    step: int
    groups: tuple[TokenizedGroup, ...]
    """[G] the groups with their tokens."""
    table: GroupTable
    contributes: Bools
    """[G] groups with contrast; the others are skipped and counted."""
    in_rows: Bools
    """[G, K] responses in a row of some replica."""
    plan: RowPlan
    rows: tuple[Row, ...]
    """This replica's rows: its micro-batches."""


Selector = Callable[[GroupTable], tuple[Bools, Bools]]
"""From a step's table to (contributes [G], scored [G, K]): the groups and responses that the loss needs."""


@dataclass(frozen=True, kw_only=True)
class RowShape:
    """How rows are cut and distributed; the same on every rank except for `replica`."""

    row_tokens: int
    layout: PromptLayout
    multiple: int
    """Row lengths are multiples of this."""
    num_replicas: int
    replica: int
    """The replica whose rows this rank builds."""
    pair_weight: float
    """Cost of an attending pair relative to a token, for load balancing."""
    rows_multiple: int = 1
    window: tuple[int, float] | None = None
    """Size of the model's sliding window in tokens, and the share of layers with it."""


def steps_per_epoch(num_groups: int, groups_per_step: int) -> int:
    """Optimizer steps in one pass over the data; the last one may be smaller."""
    return math.ceil(num_groups / groups_per_step)


def step_indices(step: int, num_groups: int, groups_per_step: int, *, seed: int, shuffle: bool) -> Int64:
    """Dataset indices of the groups of a step, counted from 0 over all epochs."""
    epoch, position = divmod(step, steps_per_epoch(num_groups, groups_per_step))
    order = epoch_order(epoch, num_groups, seed=seed, shuffle=shuffle)
    return order[position * groups_per_step : (position + 1) * groups_per_step]


def indices_of_steps(num_steps: int, num_groups: int, groups_per_step: int, *, seed: int, shuffle: bool) -> Int64:
    """Dataset indices of the groups in the first `num_steps` steps, ascending and without repetition."""
    seen, left = np.zeros(num_groups, dtype=bool), num_steps
    for epoch in range(-(-num_steps // steps_per_epoch(num_groups, groups_per_step))):
        seen[epoch_order(epoch, num_groups, seed=seed, shuffle=shuffle)[: left * groups_per_step]] = True
        left -= steps_per_epoch(num_groups, groups_per_step)
        if seen.all():
            break
    return np.flatnonzero(seen)


@functools.lru_cache(maxsize=2)
def epoch_order(epoch: int, num_groups: int, *, seed: int, shuffle: bool) -> Int64:
    """Dataset indices of all groups in an epoch's order; read-only."""
    order = np.random.default_rng((seed, epoch)).permutation(num_groups) if shuffle else np.arange(num_groups)
    order.flags.writeable = False  # it is cached
    return order


def group_table(groups: Sequence[TokenizedGroup], indices: Int64) -> GroupTable:
    """The groups' rewards, labels and lengths as padded matrices."""
    width = max(len(group.response_tokens) for group in groups)
    shape = (len(groups), width)
    valid, lengths, scored = np.zeros(shape, dtype=bool), np.zeros(shape, dtype=np.int64), np.ones(shape, dtype=np.int64)
    rewards = np.zeros(shape) if groups[0].rewards is not None else None
    labels = np.full(shape, -1, dtype=np.int8) if groups[0].labels is not None else None
    for slot, group in enumerate(groups):
        size = len(group.response_tokens)
        valid[slot, :size] = True
        lengths[slot, :size] = [len(tokens) for tokens in group.response_tokens]
        first = 0 if len(group.prompt_tokens) else 1
        masks = group.scored or [np.ones(length, dtype=bool) for length in lengths[slot, :size]]
        scored[slot, :size] = [max(1, int(mask[first:].sum())) for mask in masks]
        if rewards is not None:
            rewards[slot, :size] = group.rewards
        if labels is not None and group.labels is not None:
            labels[slot, :size] = group.labels
    return GroupTable(
        indices=indices,
        group_ids=tuple(group.group_id for group in groups),
        valid=valid,
        rewards=rewards,
        labels=labels,
        lengths=lengths,
        scored_lengths=scored,
        prompt_lengths=np.array([len(group.prompt_tokens) for group in groups], dtype=np.int64),
    )


def build_step(step: int, data: PreparedGroups, indices: Int64, select: Selector, shape: RowShape) -> StepBatch:
    """Read the step's groups, plan the rows of all replicas, and build this replica's.

    Raises:
        PackingError: a prompt with a single response is longer than a row.
    """
    groups = tuple(data[int(index)] for index in indices)
    table = group_table(groups, indices)
    contributes, scored = select(table)
    in_rows = scored & contributes[:, None]
    plan, rows = pack(table, groups, in_rows, shape)
    return StepBatch(step=step, groups=groups, table=table, contributes=contributes, in_rows=in_rows, plan=plan, rows=rows)


def pack(table: GroupTable, groups: Sequence[TokenizedGroup], scored: Bools, shape: RowShape) -> tuple[RowPlan, tuple[Row, ...]]:
    """Plan the rows of all replicas for the `scored` responses and build this replica's."""
    plan = plan_rows(
        table.prompt_lengths.tolist(),
        [row[:size].tolist() for row, size in zip(table.lengths, table.valid.sum(axis=1), strict=True)],
        scored,
        row_tokens=shape.row_tokens,
        num_replicas=shape.num_replicas,
        layout=shape.layout,
        pair_weight=shape.pair_weight,
        window=shape.window,
        rows_multiple=shape.rows_multiple,
        names=table.group_ids,
    )
    own = plan.rows[shape.replica]
    return plan, tuple(build_row(pieces, groups, layout=shape.layout, multiple=shape.multiple) for pieces in own)


def iterate_steps(
    steps: Sequence[int],
    data: PreparedGroups,
    select: Selector,
    shape: RowShape,
    *,
    groups_per_step: int,
    seed: int,
    shuffle: bool,
    first_step: int = 0,
) -> Iterator[StepBatch]:
    """The given steps in order, built ahead.

    Args:
        first_step: the step at which the data starts
    """

    def build(step: int) -> StepBatch:
        indices = step_indices(step - first_step, len(data), groups_per_step, seed=seed, shuffle=shuffle)
        return build_step(step, data, indices, select, shape)

    return build_ahead(build, steps)


def build_ahead[Item](build: Callable[[Item], StepBatch], items: Sequence[Item]) -> Iterator[StepBatch]:
    """Yield `build(item)` for each item, in order; a thread builds the next one while the current one is in use."""
    if not items:
        return
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="loader") as executor:
        coming = executor.submit(build, items[0])
        for item in items[1:]:
            batch, coming = coming.result(), executor.submit(build, item)
            yield batch
        yield coming.result()

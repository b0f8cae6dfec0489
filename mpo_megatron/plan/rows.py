"""From lengths of prompts and responses to packed rows, with the trainer's own selection and packing.

Legend: P prompt tokens, R response tokens, K responses of a group.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np

from mpo_megatron.config import require
from mpo_megatron.data.arrays import Bools
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import GroupTable, Selector, group_table
from mpo_megatron.data.packing import Piece, PromptLayout, Row, Window, count_pairs, plan_rows
from mpo_megatron.data.store import load_groups

SAMPLED_STEPS = 4
"""Number of sample steps that are packed; the plan uses their mean."""


@dataclass(frozen=True, kw_only=True)
class RowCounts:
    """Counts of a row that determine its memory and work."""

    tokens: int
    """T, padding included."""
    pairs: int
    """Pairs of attending tokens, mean over layers."""
    scored: int
    """Tokens whose log-probs are computed."""
    responses: int
    """Response tokens that are inputs and attend to a prompt in the row."""
    context: int
    """Prompt tokens, counted once per response that attends to them."""


def count_row(row: Row, window: Window | None = None) -> RowCounts:
    """The counts of a built row."""
    start, end, context_start, context_end = row.segments.T
    length, context = end - start, context_end - context_start
    sees = context > 0
    return RowCounts(
        tokens=len(row.tokens),
        pairs=sum(count_pairs(int(own), int(before), window) for own, before in zip(length, context, strict=True)),
        scored=len(row.targets),
        responses=int(length[sees].sum()),
        context=int(context.sum()),
    )


COUNTS = tuple(item.name for item in fields(RowCounts))


@dataclass(frozen=True, kw_only=True)
class PackedSteps:
    """Packed rows of some steps on a layout."""

    rows: tuple[tuple[tuple[RowCounts, ...], ...], ...]
    """Indexed `[step][replica][row]`."""
    split_groups: int
    """Groups of these steps that are split over several rows."""
    multiple: int
    """Row lengths are multiples of this."""

    @property
    def rows_per_replica(self) -> float:
        """Mean number of micro-batches per step."""
        return sum(len(step[0]) for step in self.rows) / len(self.rows)

    @functools.cached_property
    def sums(self) -> tuple[tuple[RowCounts, ...], ...]:
        """Summed counts of all rows, indexed `[step][replica]`."""
        return tuple(tuple(_sum(rows) for rows in step) for step in self.rows)

    @functools.cached_property
    def densest(self) -> dict[str, float]:
        """The maximum of each count per token of a row."""
        rows = [row for step in self.rows for replica in step for row in replica]
        return {name: max(getattr(row, name) / row.tokens for row in rows) for name in COUNTS}

    def full_row(self, row_tokens: int) -> RowCounts:
        """A row that uses its whole token budget, with each count per token as in the worst row.

        Memory must suffice for such a row, even if no sampled step has one.
        """
        tokens = -(-row_tokens // self.multiple) * self.multiple
        return RowCounts(**{name: round(tokens * density) for name, density in self.densest.items()})


def _sum(rows: Sequence[RowCounts]) -> RowCounts:
    return RowCounts(**{name: sum(getattr(row, name) for row in rows) for name in COUNTS})


@dataclass(frozen=True, eq=False)
class Sequences:
    """Sampled steps of groups: their lengths, and the responses that the loss uses."""

    steps: tuple[tuple[GroupTable, Bools], ...]
    """For each step: its table, and which responses [G, K] the loss needs."""
    num_groups: int
    """Groups of the whole data set."""
    where: str
    """Source of the lengths, as text."""
    packings: dict[tuple[int | float | str, ...], PackedSteps] = field(default_factory=dict)
    """Results of `pack` by its arguments: many layouts have the same rows."""

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with one response."""
        return max(int((table.prompt_lengths[:, None] + table.lengths - 1).max()) for table, _ in self.steps)

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max(int(table.prompt_lengths.max()) for table, _ in self.steps)

    def pack(
        self,
        *,
        row_tokens: int,
        replicas: int,
        multiple: int,
        rows_multiple: int,
        layout: PromptLayout,
        pair_weight: float,
        window: Window | None = None,
    ) -> PackedSteps:
        """The rows of every sampled step.

        Raises:
            PackingError: a prompt with one response does not fit into a row.
        """
        key = (row_tokens, replicas, multiple, rows_multiple, layout, pair_weight, *(window or ()))
        if key in self.packings:
            return self.packings[key]
        steps, split = [], 0
        for table, scored in self.steps:
            lengths = [row[:size].tolist() for row, size in zip(table.lengths, table.valid.sum(axis=1), strict=True)]
            prompts = table.prompt_lengths.tolist()
            plan = plan_rows(
                prompts,
                lengths,
                scored,
                row_tokens=row_tokens,
                num_replicas=replicas,
                layout=layout,
                pair_weight=pair_weight,
                window=window,
                rows_multiple=rows_multiple,
                names=table.group_ids,
            )
            split += len(plan.split_groups)
            steps.append(
                tuple(tuple(_count_pieces(row, prompts, lengths, layout, multiple, window) for row in rows) for rows in plan.rows)
            )
        self.packings[key] = PackedSteps(rows=tuple(steps), split_groups=split, multiple=multiple)
        return self.packings[key]


def _count_pieces(
    pieces: Sequence[Piece],
    prompts: Sequence[int],
    lengths: Sequence[Sequence[int]],
    layout: PromptLayout,
    multiple: int,
    window: Window | None,
) -> RowCounts:
    """The counts of a planned row: equal to `count_row` of the row built by `build_row`."""
    tokens = sum(piece.num_tokens for piece in pieces)
    padded = max(multiple, -(-tokens // multiple) * multiple)
    padding = padded - tokens
    responses = context = 0
    if layout == "shared":
        for piece in pieces:
            prompt = prompts[piece.slot]
            inputs = [lengths[piece.slot][k] - 1 for k in piece.responses]
            responses += sum(inputs)
            context += prompt * sum(length > 0 for length in inputs)
    return RowCounts(
        tokens=padded,
        pairs=sum(piece.num_pairs for piece in pieces) + count_pairs(padding, 0, window),
        scored=sum(lengths[piece.slot][k] for piece in pieces for k in piece.responses),
        responses=responses,
        context=context,
    )


def read_lengths(folder: str, select: Selector, groups_per_step: int) -> Sequences:
    """Steps spread evenly over prepared groups."""
    data = load_groups(folder)
    size = min(groups_per_step, len(data))
    starts = np.unique(np.linspace(0, len(data) - size, SAMPLED_STEPS).astype(int))
    steps = []
    for start in starts:
        groups = [data[int(index)] for index in range(start, start + size)]
        steps.append(_select(groups, select))
    return Sequences(tuple(steps), len(data), str(Path(folder)))


def draw_lengths(
    *,
    prompt: int,
    response: int,
    responses: int,
    spread: float,
    select: Selector,
    groups_per_step: int,
    num_groups: int,
    seed: int = 0,
) -> Sequences:
    """Steps of groups with lengths uniform in mean × (1 ± spread) and random rewards."""
    require(prompt >= 1 and response >= 1, f"prompt_tokens = {prompt}, response_tokens = {response}; both must be at least 1.")
    rng = np.random.default_rng(seed)

    def lengths(mean: int, count: int) -> list[int]:
        drawn = np.rint(mean * rng.uniform(1 - spread, 1 + spread, count)).astype(int).clip(min=1)
        return [int(length) for length in drawn]

    steps = []
    for _ in range(SAMPLED_STEPS if spread else 1):  # without spread all steps are equal
        groups = []
        for index in range(groups_per_step):
            rewards = rng.normal(size=responses)
            groups.append(
                TokenizedGroup(
                    group_id=f"#{index}",
                    prompt_tokens=np.zeros(lengths(prompt, 1)[0], dtype=np.int32),
                    response_tokens=tuple(np.zeros(length, dtype=np.int32) for length in lengths(response, responses)),
                    rewards=rewards,
                    labels=(rewards > rewards.mean()).astype(np.int8),
                )
            )
        steps.append(_select(groups, select))
    where = f"prompts of {prompt}, {responses} responses of {response} tokens, ± {spread:.0%}"
    return Sequences(tuple(steps), num_groups, where)


def _select(groups: Sequence[TokenizedGroup], select: Selector) -> tuple[GroupTable, Bools]:
    table = group_table(groups, np.arange(len(groups)))
    contributes, scored = select(table)
    return table, scored & contributes[:, None]

"""Groups to packed rows: which responses go into which row of which replica, and the layout of a row.

A row is one micro-batch of up to `row_tokens` tokens. In the shared layout it stores a group as `[prompt | y_1 | … | y_K]`:
positions restart after the prompt for every response, and `segments` defines which tokens attend to which. The last token of a
response predicts nothing scored, so it is a target but never an input. If the prompt is empty, nothing predicts a response's
first token, so it is an input but never a target. Tokens that the model did not generate (tool results) are inputs but never
targets.

Legend: T tokens of a row, S scored tokens of a row, R responses of a row, G groups of a step, K responses of a group.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from mpo_megatron.data.arrays import Int64

PromptLayout = Literal["shared", "unshared"]


class PackingError(ValueError):
    """A response does not fit into a row; the message names the group, its length and the fix."""


class HasTokens(Protocol):
    """The part of a group that packing reads."""

    @property
    def group_id(self) -> str: ...
    @property
    def prompt_tokens(self) -> npt.NDArray[np.int32]: ...
    @property
    def response_tokens(self) -> Sequence[npt.NDArray[np.int32]]: ...
    @property
    def scored(self) -> Sequence[npt.NDArray[np.bool_]] | None: ...


Window = tuple[int, float]
"""Size of a sliding window in tokens, and the share of layers with it."""


class Piece(NamedTuple):
    """Responses of one group in one row: the whole group, or a part of one that is longer than a row."""

    slot: int
    """The group's slot in the step, 0 … G−1."""
    responses: tuple[int, ...]
    """Indices of its responses, 0 … K−1."""
    num_tokens: int
    """Tokens in the row."""
    num_pairs: int
    """Pairs of attending tokens, mean over layers."""
    leads: bool = True
    """Whether it contains the group's first response in any row: its copy of the prompt is the one that counts."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One packed row."""

    tokens: Int64
    """[T] input ids, padding included."""
    position_ids: Int64
    """[T] positions, restarting after each prompt."""
    segments: Int64
    """[segments, 4]: start, end, context_start, context_end; they cover the whole row."""
    sources: Int64
    """[S] row index of the token that predicts each scored token."""
    targets: Int64
    """[S] ids of the scored tokens."""
    response_of: Int64
    """[S] index among the row's responses of each scored token."""
    responses: Int64
    """[R, 2]: slot of the group in the step, and index of the response."""
    inputs: Int64
    """[R, 2]: start and end in the row of each response's own input tokens: all except the last."""
    slots: Int64
    """[T] slot of each token's group; −1 for padding."""
    places: Int64
    """[T] index of each token among its group's input tokens (prompt, then responses without their last); −1 for padding."""
    counted: npt.NDArray[np.bool_]
    """[T] False for padding and repeated copies of a prompt, so that each of a group's tokens counts once."""
    num_tokens: int
    """Number of tokens without padding."""


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    """The pieces in each row of each replica; every replica has the same number of rows."""

    rows: tuple[tuple[tuple[Piece, ...], ...], ...]
    """Indexed `[replica][row][piece]`; a row without pieces is a filler."""
    split_groups: frozenset[int]
    """Slots of groups that are split over several rows."""

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows of all replicas, without padding."""
        return sum(piece.num_tokens for rows in self.rows for row in rows for piece in row)


def plan_rows(
    prompt_lengths: Sequence[int],
    response_lengths: Sequence[Sequence[int]],
    scored: npt.NDArray[np.bool_],
    *,
    row_tokens: int,
    num_replicas: int,
    layout: PromptLayout,
    pair_weight: float = 0.0,
    rows_multiple: int = 1,
    names: Sequence[str] | None = None,
    window: Window | None = None,
) -> RowPlan:
    """Split groups into pieces, find the number of rows by first-fit-decreasing, and balance the work of rows and replicas.

    Deterministic, and the same on every rank. Responses that are not `scored` are dropped.

    Args:
        prompt_lengths: [G] tokens of each prompt
        response_lengths: `[G][K]` tokens of each response
        scored: [G, K] responses whose log-probs the loss needs
        row_tokens: token budget of a row
        pair_weight: cost of an attending pair of tokens relative to that of a token in the linear layers
        rows_multiple: the number of rows per replica is a multiple of this
        names: [G] group ids for messages
        window: the model's window, if any
    Raises:
        PackingError: a prompt with a single response is longer than a row.
    """
    pieces: list[Piece] = []
    split: set[int] = set()
    for slot, (prompt, lengths) in enumerate(zip(prompt_lengths, response_lengths, strict=True)):
        wanted = [k for k in range(len(lengths)) if scored[slot, k]]
        parts = _cut_group(slot, prompt, lengths, wanted, row_tokens, layout, names, window)
        pieces += parts
        if len(parts) > 1:
            split.add(slot)
    rows = _first_fit_decreasing(pieces, row_tokens)
    return RowPlan(rows=_spread(rows, row_tokens, num_replicas, pair_weight, rows_multiple), split_groups=frozenset(split))


def _cut_group(
    slot: int,
    prompt: int,
    lengths: Sequence[int],
    wanted: Sequence[int],
    row_tokens: int,
    layout: PromptLayout,
    names: Sequence[str] | None,
    window: Window | None,
) -> list[Piece]:
    """The group as one piece if it fits into a row, else as the fewest pieces of a greedy split, each with the prompt."""
    parts: list[Piece] = []
    current: list[int] = []
    once, each = (prompt, 0) if layout == "shared" else (0, prompt)  # tokens of the prompt: per piece, per response
    tokens = once
    for k in wanted:
        own = each + lengths[k] - 1
        if current and tokens + own > row_tokens:
            parts.append(_measure(slot, prompt, lengths, current, layout, window))
            current, tokens = [], once
        current.append(k)
        tokens += own
    if current:
        parts.append(_measure(slot, prompt, lengths, current, layout, window))
    parts[1:] = [part._replace(leads=False) for part in parts[1:]]
    for part in parts:
        if part.num_tokens > row_tokens:
            name = names[slot] if names is not None else f"#{slot}"
            raise PackingError(
                f"group {name}: its prompt and response {part.responses[0]} take {part.num_tokens} tokens, "
                f"but data.row_tokens = {row_tokens}; raise data.row_tokens, or prepare the data with smaller limits."
            )
    return parts


def _measure(
    slot: int, prompt: int, lengths: Sequence[int], responses: Sequence[int], layout: PromptLayout, window: Window | None
) -> Piece:
    """Tokens and attending pairs of one prompt with these responses."""
    inputs = [lengths[k] - 1 for k in responses]
    within = sum(count_pairs(n, prompt, window) for n in inputs)
    copies = 1 if layout == "shared" else len(responses)
    return Piece(slot, tuple(responses), copies * prompt + sum(inputs), copies * count_pairs(prompt, 0, window) + within)


def count_pairs(length: int, context: int, window: Window | None = None) -> int:
    """Pairs of attending tokens: a segment's tokens with its context and causal past, mean over layers."""
    full = length * (length + 1) // 2 + length * context
    if window is None:
        return full
    tokens, share = window

    def seen(count: int) -> int:
        """Pairs within the window among the first `count` tokens of a sequence."""
        inside = min(count, tokens)
        return inside * (inside + 1) // 2 + (count - inside) * tokens

    return full - round(share * (full - seen(context + length) + seen(context)))


def _first_fit_decreasing(pieces: Sequence[Piece], row_tokens: int) -> list[tuple[Piece, ...]]:
    rows: list[list[Piece]] = [[] for _ in pieces]
    free = np.full(len(pieces), row_tokens)
    for piece in sorted(pieces, key=lambda piece: (-piece.num_tokens, piece.slot, piece.responses)):
        index = int((free >= piece.num_tokens).argmax())  # there are as many rows as pieces, so one fits
        rows[index].append(piece)
        free[index] -= piece.num_tokens
    return [tuple(sorted(row)) for row in rows if row]


def _spread(
    rows: Sequence[tuple[Piece, ...]], row_tokens: int, num_replicas: int, pair_weight: float, rows_multiple: int
) -> tuple[tuple[tuple[Piece, ...], ...], ...]:
    """Rows [replica][row] of similar work: as few per replica as hold `rows`; pieces are reassigned if they fit.

    Otherwise some replicas would wait for one with an additional full row, and pipeline stages for the longest row.
    """

    def work(pieces: Sequence[Piece]) -> float:
        return sum(piece.num_tokens + pair_weight * piece.num_pairs for piece in pieces)

    per_replica = max(1, -(-len(rows) // num_replicas))
    per_replica = -(-per_replica // rows_multiple) * rows_multiple

    def deal(bundles: Sequence[tuple[Piece, ...]]) -> list[list[list[Piece]]] | None:
        """Longest processing time first: each bundle to the least loaded replica with room, there to the emptiest row."""
        dealt: list[list[list[Piece]]] = [[[] for _ in range(per_replica)] for _ in range(num_replicas)]
        loads = [(0.0, replica) for replica in range(num_replicas)]  # a heap, like the next one
        filled = [[(-row_tokens, row) for row in range(per_replica)] for _ in range(num_replicas)]
        for bundle in sorted(bundles, key=lambda bundle: (-work(bundle), bundle)):
            tokens, full = sum(piece.num_tokens for piece in bundle), []
            while loads and -filled[loads[0][1]][0][0] < tokens:
                full.append(heapq.heappop(loads))
            if not loads:
                return None
            load, replica = loads[0]
            free, row = filled[replica][0]
            dealt[replica][row] += bundle
            heapq.heapreplace(filled[replica], (free + tokens, row))
            heapq.heapreplace(loads, (load + work(bundle), replica))
            for item in full:
                heapq.heappush(loads, item)
        return dealt

    dealt = deal([(piece,) for row in rows for piece in row]) or deal(rows)
    assert dealt is not None  # whole rows always fit
    return tuple(tuple(tuple(sorted(row)) for row in own) for own in dealt)


def build_row(pieces: Sequence[Piece], groups: Sequence[HasTokens], *, layout: PromptLayout, multiple: int = 1) -> Row:
    """Build one row from pieces, padded to a multiple of `multiple` tokens (at least one multiple).

    Padding is a separate segment: nothing attends to it, and none of it is scored.

    Args:
        groups: [G] the step's groups, indexed by a piece's slot
    """
    row = _RowBuilder()
    for piece in pieces:
        group = groups[piece.slot]
        prompt = group.prompt_tokens
        first_places = response_places(group)
        within = np.arange(len(prompt))
        context = None
        if layout == "shared":
            context = row.add_segment(prompt, first_position=0)
            row.place(piece.slot, within, counted=piece.leads)
        for number, k in enumerate(piece.responses):
            response = group.response_tokens[k]
            own = first_places[k] + np.arange(len(response) - 1)
            if context is None:
                start, _ = row.add_segment(np.concatenate((prompt, response[:-1])), first_position=0)
                row.place(piece.slot, within, counted=piece.leads and number == 0)
                sources = start + len(prompt) - 1 + np.arange(len(response))
                start += len(prompt)
            else:
                start, _ = row.add_segment(response[:-1], first_position=len(prompt), context=context)
                sources = np.concatenate(([context[1] - 1], start + np.arange(len(response) - 1)))
            row.place(piece.slot, own, counted=True)
            generated = np.ones(len(response), dtype=bool) if group.scored is None else group.scored[k].copy()
            generated[0] &= len(prompt) > 0
            row.score(piece.slot, k, sources[generated], response[generated], start)
    return row.finish(multiple)


def response_places(group: HasTokens) -> Int64:
    """[K + 1] index of each response's first token among the group's input tokens; and their number."""
    lengths = [len(response) - 1 for response in group.response_tokens]
    return len(group.prompt_tokens) + np.concatenate((np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)))


class _RowBuilder:
    """A row under construction."""

    def __init__(self) -> None:
        self.length = 0
        self.tokens: list[npt.NDArray[np.int32]] = []
        self.positions: list[Int64] = []
        self.segments: list[tuple[int, int, int, int]] = []
        self.sources: list[Int64] = []
        self.targets: list[npt.NDArray[np.int32]] = []
        self.responses: list[tuple[int, int]] = []
        self.inputs: list[tuple[int, int]] = []
        self.slots: list[Int64] = []
        self.places: list[Int64] = []
        self.counted: list[npt.NDArray[np.bool_]] = []

    def add_segment(
        self, tokens: npt.NDArray[np.int32], first_position: int, context: tuple[int, int] | None = None
    ) -> tuple[int, int]:
        """Append tokens that attend to `context` and their own past; returns their [start, end)."""
        start, end = self.length, self.length + len(tokens)
        if end > start:
            self.segments.append((start, end, *(context or (start, start))))
        self.tokens.append(tokens)
        self.positions.append(first_position + np.arange(len(tokens)))
        self.length = end
        return start, end

    def place(self, slot: int, places: Int64, *, counted: bool) -> None:
        """Record which of a group's input tokens the next tokens of the row are, in order of addition."""
        self.slots.append(np.full(len(places), slot, dtype=np.int64))
        self.places.append(places)
        self.counted.append(np.full(len(places), counted))

    def score(self, slot: int, k: int, sources: Int64, targets: npt.NDArray[np.int32], start: int) -> None:
        """Score `targets`, each predicted by the token at `sources`; the response's inputs start at `start` and end the row."""
        self.sources.append(sources)
        self.targets.append(targets)
        self.responses.append((slot, k))
        self.inputs.append((start, self.length))

    def finish(self, multiple: int) -> Row:
        """Pad and freeze."""
        num_tokens = self.length
        padding = max(multiple, -(-num_tokens // multiple) * multiple) - num_tokens
        self.add_segment(np.zeros(padding, dtype=np.int32), first_position=0)
        self.place(-1, np.full(padding, -1, dtype=np.int64), counted=False)
        lengths = [len(targets) for targets in self.targets]
        return Row(
            tokens=_join(self.tokens),
            position_ids=_join(self.positions),
            segments=np.array(self.segments, dtype=np.int64).reshape(-1, 4),
            sources=_join(self.sources),
            targets=_join(self.targets),
            response_of=np.repeat(np.arange(len(lengths)), lengths),
            responses=np.array(self.responses, dtype=np.int64).reshape(-1, 2),
            inputs=np.array(self.inputs, dtype=np.int64).reshape(-1, 2),
            slots=_join(self.slots),
            places=_join(self.places),
            counted=_join(self.counted).astype(bool),
            num_tokens=num_tokens,
        )


def _join(parts: Sequence[npt.NDArray[np.integer] | npt.NDArray[np.bool_]]) -> Int64:
    return np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64)

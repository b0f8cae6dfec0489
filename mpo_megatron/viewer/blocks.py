"""Decode a packed row: which tokens are prompt, response or padding, which are scored, and which attend to which.

Everything is read from the row's own arrays, which training computes with, so the display shows the actual computation.
Legend: T tokens of a row.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.packing import Row
from mpo_megatron.data.tokenizer import Tokenizer

Role = Literal["prompt", "response", "padding", "left out"]
PROMPT, PADDING = -1, -2


class Token(NamedTuple):
    """One token."""

    id: int
    text: str
    special: bool
    scored: bool
    """Whether its log-prob enters the loss."""
    position: int | None
    """Its position id; None for a response's last token, which is only predicted, not an input of the row."""


@dataclass(frozen=True, kw_only=True)
class Block:
    """Consecutive tokens of one role."""

    role: Role
    slot: int | None
    """The group's slot in the step; None for padding."""
    response: int | None
    """Index of the response in its group; None for prompts and padding."""
    start: int | None
    """Its start in the row; None if it is not in the row."""
    num_inputs: int
    """Number of tokens in the row."""
    tokens: tuple[Token, ...]


def blocks_of(
    row: Row, groups: Sequence[TokenizedGroup], tokenizer: Tokenizer, left_out: Sequence[tuple[int, int]]
) -> list[Block]:
    """The row's blocks in order, then responses that the loss does not use.

    Args:
        groups: [G] the step's groups
        left_out: (slot, response) of responses of the row's groups that are in no row
    """
    read = Reader(tokenizer)
    owner = owners(row)
    blocks: list[tuple[float, Block]] = []
    for start, end, slot in _runs(row, owner):
        kind = int(owner[start])
        if kind >= 0:
            blocks.append((start, _response_block(row, kind, groups, start, end, read)))
            continue
        tokens = [
            read.token(row.tokens[place], False, None if kind == PADDING else int(row.position_ids[place]))
            for place in range(start, end)
        ]
        role: Role = "padding" if kind == PADDING else "prompt"
        block = Block(
            role=role,
            slot=None if kind == PADDING else slot,
            response=None,
            start=start,
            num_inputs=end - start,
            tokens=tuple(tokens),
        )
        blocks.append((start, block))
    for number in range(len(row.responses)):  # a response of one token is only predicted: it has no input token
        start, end = row.inputs[number].tolist()
        if start == end:
            blocks.append((start - 0.5, _response_block(row, number, groups, None, None, read)))
    blocks.sort(key=lambda pair: pair[0])
    absent = [_left_out(groups[slot], slot, response, read) for slot, response in left_out]
    return [*(block for _, block in blocks), *absent]


def owners(row: Row) -> npt.NDArray[np.int64]:
    """[T] the row's response that each input token belongs to; or PROMPT or PADDING."""
    owner = np.full(len(row.tokens), PROMPT)
    for number in range(len(row.responses)):
        start, end = row.inputs[number].tolist()
        owner[start:end] = number
    owner[row.num_tokens :] = PADDING
    return owner


def attention_mask(row: Row) -> npt.NDArray[np.bool_]:
    """[T, T] whether a query (first axis) attends to a key: its segment's past and itself, and its context."""
    mask = np.zeros((len(row.tokens), len(row.tokens)), dtype=bool)
    for start, end, context_start, context_end in row.segments:
        mask[start:end, start:end] = np.tri(end - start, dtype=bool)
        mask[start:end, context_start:context_end] = True
    return mask


def _runs(row: Row, owner: npt.NDArray[np.int64]) -> list[tuple[int, int, int]]:
    """(start, end, slot) of ranges with one owner within one segment."""
    runs = []
    for start, end, _, _ in row.segments.tolist():
        edges = [start, *(start + 1 + np.flatnonzero(np.diff(owner[start:end]))).tolist(), end]
        runs += [(first, last, _slot(row, last)) for first, last in itertools.pairwise(edges)]
    return runs


def _slot(row: Row, end: int) -> int:
    """The group of a prompt that ends at `end`: the group of the first response after it; −1 without one."""
    followers = np.flatnonzero(row.inputs[:, 0] >= end)
    return int(row.responses[followers[0], 0]) if len(followers) else -1


def _response_block(
    row: Row, number: int, groups: Sequence[TokenizedGroup], start: int | None, end: int | None, read: Reader
) -> Block:
    slot, response = row.responses[number].tolist()
    first, last = row.inputs[number].tolist()
    ids = [*row.tokens[first:last].tolist(), int(groups[slot].response_tokens[response][-1])]  # the last token is no input
    sources = row.sources[row.response_of == number]
    scored = set(np.where(sources >= first, sources - first + 1, 0).tolist())  # the first token is predicted by the prompt's last
    positions = [*row.position_ids[first:last].tolist(), None]
    tokens = [
        read.token(token, place in scored, position) for place, (token, position) in enumerate(zip(ids, positions, strict=True))
    ]
    return Block(
        role="response",
        slot=slot,
        response=response,
        start=start,
        num_inputs=0 if start is None or end is None else end - start,
        tokens=tuple(tokens),
    )


def _left_out(group: TokenizedGroup, slot: int, response: int, read: Reader) -> Block:
    tokens = tuple(read.token(token, False, None) for token in group.response_tokens[response])
    return Block(role="left out", slot=slot, response=response, start=None, num_inputs=0, tokens=tokens)


class Reader:
    """Decodes token ids one by one."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        # Decoders drop the space before a text's first word, but keep it after another token.
        self.anchor = tokenizer.encode("a")[-1:]
        self.lead = tokenizer.decode(self.anchor)
        self.known: dict[int, str] = {}

    def token(self, index: int | np.integer, scored: bool, position: int | None) -> Token:
        """One token; a partial character, which is no text by itself, as ⟨id⟩."""
        index = int(index)
        if index not in self.known:
            text = self.tokenizer.decode([*self.anchor, index])
            text = text[len(self.lead) :] if text.startswith(self.lead) else self.tokenizer.decode([index])
            self.known[index] = f"⟨{index}⟩" if "\ufffd" in text or not text else text
        return Token(index, self.known[index], index in self.tokenizer.special_ids, scored, position)

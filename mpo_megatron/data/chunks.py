"""A run of rows that one worker tokenizes, and its result.

Which ids came before, only the process that sees all rows can say: it takes repeated groups out of a chunk afterwards
(`Chunk.reject`).
"""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import pyarrow as pa

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.raw_rows import RawRow, Rejection
from mpo_megatron.data.readers import InputReader, PartOfRow

REWARDS, LABELS = 1, 2
"""Bits of `Chunk.holds`."""


class Task(NamedTuple):
    """A run of rows that are tokenized together."""

    reader: InputReader
    first: int
    """The place of the first row among all."""
    rows: list[RawRow | PartOfRow]


class Event(NamedTuple):
    """Something to count in the summary."""

    row: int
    """Index of the row that it concerns, in its chunk."""
    table: str
    """A counter of `Tally`; "" for its plain numbers."""
    name: str
    number: int
    example: str
    """The case in words; "" for none."""


class Built(NamedTuple):
    """A group that was read, whether or not it could be tokenized."""

    row: int
    group_id: str
    where: str
    own_id: bool
    """Whether the row gives the id itself."""


@dataclass(kw_only=True)
class Chunk:
    """A worker's result, in the order of its rows."""

    num_rows: int = 0
    number: int = 0
    """The input that the rows were read from."""
    row: int = 0
    """The row that is being counted."""
    batch: pa.RecordBatch | None = None
    accepted: list[int] = field(default_factory=list)
    """For each accepted group, its row."""
    prompt_keys: list[bytes] = field(default_factory=list)
    """For each accepted group, 16 bytes: a hash of its prompt's messages."""
    holds: bytearray = field(default_factory=bytearray)
    """For each accepted group, whether it has REWARDS, LABELS."""
    rejections: dict[int, Rejection] = field(default_factory=dict)
    """Rejections, by row."""
    built: list[Built] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    unused: Counter[str] = field(default_factory=Counter)
    """Unread columns and keys, with their number of rows."""

    def count(self, name: str, example: str, number: int = 1, table: str = "") -> None:
        """Count something about the current row."""
        if number:
            self.events.append(Event(self.row, table, name, int(number), example))

    def drop(self, where: str, fault: str) -> None:
        """Count a response of the current row that cannot be used."""
        name = fault.split(" ")[0].split("[")[0].split(".")[0]
        self.count(name, f"{where}: {fault}", table="dropped")

    def reject(self, repeated: dict[int, RowError]) -> None:
        """Take out groups whose id came before.

        Args:
            repeated: by row, what is wrong
        """
        for built in self.built:
            if (error := repeated.get(built.row)) is not None:
                self.rejections[built.row] = make_rejection(built.where, built.group_id, error)
        self.rejections = dict(sorted(self.rejections.items()))
        self.events = [event for event in self.events if event.row not in repeated]
        stays = [row not in repeated for row in self.accepted]
        if self.batch is not None:
            self.batch = self.batch.filter(pa.array(stays)) if any(stays) else None
        self.accepted = list(itertools.compress(self.accepted, stays))
        self.prompt_keys = list(itertools.compress(self.prompt_keys, stays))
        self.holds = bytearray(itertools.compress(self.holds, stays))


def make_rejection(where: str, group_id: str, error: RowError) -> Rejection:
    """The rejection of a group that was read at `where`."""
    file, _, line = where.rpartition(":")
    return Rejection(file=file, line=int(line), group_id=group_id, field=error.field, reason=error.reason)

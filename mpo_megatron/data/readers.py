"""Inputs → groups.

    stream = read_groups("pairs.jsonl")
    for item in stream.items:        # `Group`, or `Rejection` for a row that cannot become one
        ...

Rows arrive in the order of the input, so later stages may run in parallel and stay reproducible. Memory holds a few rows; facts
about all of them are on disk (spill.py). `open_inputs` returns undecoded rows, for other processes to read.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import InputLayout, Options, Parsed, build_group, detect, find_format, parse, rename
from mpo_megatron.data.group import Group
from mpo_megatron.data.raw_rows import RawRow, Rejection
from mpo_megatron.data.sources import open_undecoded
from mpo_megatron.data.spill import Spill
from mpo_megatron.files import DataError

SAMPLE = 64
"""Number of rows from which the format is detected."""


class PartOfRow(NamedTuple):
    """A row that is parsed: its value is no longer needed, but for its id."""

    row: RawRow
    part: Parsed | RowError


@dataclass(frozen=True, kw_only=True)
class InputReader:
    """How rows of an input become groups; the same in every process."""

    layout: InputLayout
    columns: Mapping[str, str]
    """Our names of columns → the input's."""
    number: int = 0
    """Which of several inputs this is."""
    id_prefix: str = ""
    """Put before the ids that rows give themselves."""

    def parse(self, row: RawRow) -> PartOfRow:
        """The parts of a group that a row holds."""
        row = _decode(row, self.columns)
        try:
            if isinstance(row.value, RowError):
                raise row.value
            return PartOfRow(row, parse(row.value, self.layout))
        except RowError as error:
            return PartOfRow(row, error)
        except RecursionError:
            return PartOfRow(row, RowError("row", "is nested too deeply"))

    def build(self, parsed: PartOfRow) -> Group | Rejection:
        """The group of a row."""
        row, part = parsed
        if isinstance(part, RowError):
            return row.reject(part, _peek_id(row.value))
        if part.group_id is not None and self.id_prefix:
            part = replace(part, group_id=self.id_prefix + part.group_id)
        try:
            return build_group(part, f"{row.file}:{row.line}", self.number)
        except RowError as error:
            return row.reject(error, part.group_id)


class RowStream(NamedTuple):
    """An input whose format is settled."""

    reader: InputReader
    total: int | None
    """About how many rows follow; for the progress bar."""
    rows: Iterator[RawRow] | Iterator[PartOfRow]
    """One for each group or rejection; parsed already where several rows of the input make a group."""
    unused: Counter[str]
    """Columns and keys that the parsed rows do not use, with the number of rows that have them."""

    @property
    def layout(self) -> InputLayout:
        """What the rows have in common."""
        return self.reader.layout


class GroupStream(NamedTuple):
    """Groups of an input in order, and what they have in common."""

    layout: InputLayout
    total: int | None
    """Approximate number of items, for the progress bar."""
    items: Iterator[Group | Rejection]
    unused: Counter[str]
    """Unused columns and keys, with their number of rows; complete once the items are read."""


def parse_rating(rating: str | None) -> tuple[str, ...]:
    """The fields in `a+b`."""
    return tuple(name.strip() for name in rating.split("+")) if rating else ()


def open_input(
    source: str,
    *,
    format_name: str = "auto",
    split: str = "train",
    subset: str | None = None,
    rating: str | None = None,
    columns: Mapping[str, str] | None = None,
    drop_ranks: Iterable[int] = (),
    max_rows: int | None = None,
    number: int = 0,
    id_prefix: str = "",
) -> RowStream:
    """The rows of an input, in its order, and how to read them.

    Args:
        columns: our names of columns → the input's
        number: index of this input among several
        id_prefix: prefix of ids from the rows

    Raises:
        DataError: the input cannot be read, or its format is not recognised.
    """
    total, raw = open_undecoded(source, split=split, subset=subset)
    if max_rows is not None:
        total, raw = (max_rows if total is None else min(total, max_rows)), itertools.islice(raw, max_rows)
    renamed = dict(columns or {})
    first_rows = list(itertools.islice(raw, SAMPLE))
    head = [_decode(row, renamed) for row in first_rows]
    sample = [row.value for row in head if isinstance(row.value, dict)]
    if not head:
        raise DataError(f"input = {source}; it is empty; name a file with groups.")
    if not sample:
        first = f"{head[0].file}:{head[0].line}: {_describe(head[0].value)}"
        raise DataError(f"input = {source}; none of its first {len(head)} rows is an object with fields; the first: {first}.")
    missing = sorted(ours for ours in renamed if not any(ours in row for row in sample))
    if missing:
        found = sorted({str(renamed.get(name, name)) for row in sample for name in row})
        raise DataError(
            f"columns: {missing[0]} = {renamed[missing[0]]}; {source} has no such column in its first rows; found {found}."
        )
    layout = detect(sample, format_name, Options(ratings=parse_rating(rating), drop_ranks=tuple(drop_ranks)))
    reader = InputReader(layout=layout, columns=renamed, number=number, id_prefix=id_prefix)
    rows, unused = itertools.chain(first_rows, raw), Counter[str]()
    if find_format(layout.format).joins_rows:
        return RowStream(reader, total, gather(_parse_rows(rows, reader, unused)), unused)
    return RowStream(reader, total, iter(rows), unused)


def open_inputs(sources: Sequence[str], **options: Any) -> list[RowStream]:
    """Rows of several inputs; ids that rows give themselves begin with the input's number, if there is more than one.

    Raises:
        DataError: as `open_input`.
    """
    several = len(sources) > 1
    return [
        open_input(source, number=number, id_prefix=f"{number}:" if several else "", **options)
        for number, source in enumerate(sources)
    ]


def read_groups(source: str, **options: Any) -> GroupStream:
    """Groups of an input, in its order; every row that is not one comes as a `Rejection`.

    Args:
        options: as `open_input` takes them

    Raises:
        DataError: as `open_input`.
    """
    return build_groups(open_input(source, **options), Spill())


def read_inputs(sources: Sequence[str], **options: Any) -> list[GroupStream]:
    """Groups of several inputs with distinct ids.

    Raises:
        DataError: as `open_inputs`.
    """
    seen = Spill()
    return [build_groups(stream, seen) for stream in open_inputs(sources, **options)]


def build_groups(stream: RowStream, seen: Spill) -> GroupStream:
    """Groups of rows.

    Args:
        seen: remembers ids
    """

    def items() -> Iterator[Group | Rejection]:
        rows = (row if isinstance(row, PartOfRow) else stream.reader.parse(row) for row in stream.rows)
        for parsed in rows:
            if isinstance(parsed.part, Parsed):
                stream.unused.update(parsed.part.unused)
            item = stream.reader.build(parsed)
            own = isinstance(parsed.part, Parsed) and parsed.part.group_id is not None
            repeats = None if isinstance(item, Rejection) else find_repeated(seen, item.group_id, item.where, own=own)
            yield item if repeats is None else parsed.row.reject(repeats, item.group_id)

    return GroupStream(stream.layout, stream.total, items(), stream.unused)


def find_repeated(seen: Spill, group_id: str, where: str, *, own: bool) -> RowError | None:
    """What is wrong with a group whose id came before; None, and the id is remembered, if it did not.

    Args:
        own: whether the row gave the id itself
    """
    before = seen.first_place(group_id, where)
    if before is None:
        return None
    return RowError("id", f"{'repeats the id' if own else 'repeats the prompt, responses and rewards'} of {before}")


def _decode(row: RawRow, columns: Mapping[str, str]) -> RawRow:
    row = row.decode()
    return row._replace(value=rename(row.value, columns)) if columns else row


def _describe(value: Any) -> str:
    return str(value) if isinstance(value, RowError) else f"it is of type {type(value).__name__}"


def _parse_rows(rows: Iterable[RawRow], reader: InputReader, unused: Counter[str]) -> Iterator[PartOfRow]:
    for row in rows:
        parsed = reader.parse(row)
        if isinstance(parsed.part, Parsed):
            unused.update(parsed.part.unused)
        yield parsed


def gather(parsed: Iterable[PartOfRow]) -> Iterator[PartOfRow]:
    """Join responses to the same prompt from several rows: unusable rows first, then groups in order of their first row."""
    spill = Spill()
    for row, part in parsed:
        if isinstance(part, RowError):
            yield PartOfRow(row, part)
        else:
            spill.put(json.dumps([part.prompt, part.tools], sort_keys=True), (row.file, row.line, part))
    for rows in spill.take():
        file, line, first = rows[0]
        parts: list[Parsed] = [part for _, _, part in rows]
        rewards = tuple(reward for part in parts for reward in part.rewards or ())
        labels = tuple(label for part in parts for label in part.labels or ())
        yield PartOfRow(
            RawRow(file, line, None),
            Parsed(
                prompt=first.prompt,
                tools=first.tools,
                responses=tuple(response for part in parts for response in part.responses),
                rewards=rewards or None,
                labels=labels or None,
            ),
        )


def _peek_id(value: Any) -> str | None:
    """The id of a faulty row, for the report."""
    found = value.get("group_id", value.get("id")) if isinstance(value, dict) else None
    return str(found) if isinstance(found, str | int) else None

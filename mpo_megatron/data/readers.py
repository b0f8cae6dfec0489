"""Inputs → groups.

    stream = read_groups("pairs.jsonl")
    for item in stream.items:        # `Group`, or `Rejection` for a row that cannot become one
        ...

Rows arrive in the order of the input, so later stages may run in parallel and stay reproducible. Memory holds a few rows; facts
about all of them are on disk (spill.py).
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import InputLayout, Options, Parsed, build_group, detect, find_format, parse, rename
from mpo_megatron.data.group import Group
from mpo_megatron.data.sources import RawRow, Rejection, open_source
from mpo_megatron.data.spill import Spill
from mpo_megatron.files import DataError

SAMPLE = 64
"""Number of rows from which the format is detected."""


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


def read_groups(
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
    seen: Spill | None = None,
) -> GroupStream:
    """Groups of an input, in order; every other row yields a `Rejection`.

    Args:
        columns: our names of columns → the input's
        number: index of this input among several
        id_prefix: prefix of ids from the rows
        seen: store of ids, if several inputs share it

    Raises:
        DataError: the input cannot be read, or its format is not recognised.
    """
    total, raw = open_source(source, split=split, subset=subset)
    if max_rows is not None:
        total, raw = (max_rows if total is None else min(total, max_rows)), itertools.islice(raw, max_rows)
    renamed = dict(columns or {})
    rows = (row._replace(value=rename(row.value, renamed)) for row in raw)
    head = list(itertools.islice(rows, SAMPLE))
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
    unused = Counter[str]()
    items = build_groups(itertools.chain(head, rows), layout, unused, seen or Spill(), number=number, id_prefix=id_prefix)
    return GroupStream(layout, total, items, unused)


def build_groups(
    rows: Iterable[RawRow], layout: InputLayout, unused: Counter[str], seen: Spill, *, number: int = 0, id_prefix: str = ""
) -> Iterator[Group | Rejection]:
    """Groups of rows whose format is settled.

    Args:
        unused: receives unread columns and keys
        seen: stores ids, and rows of formats that build groups from several rows
    """
    parsed = _parse_rows(rows, layout, unused)
    if find_format(layout.format).joins_rows:
        parsed = _gather(parsed, seen)
    return _build(parsed, seen, number, id_prefix)


def read_inputs(sources: Sequence[str], **options: Any) -> list[GroupStream]:
    """Groups of several inputs; with several inputs, ids from rows get the input's number as prefix.

    Raises:
        DataError: as in `read_groups`.
    """
    seen, several = Spill(), len(sources) > 1
    return [
        read_groups(source, number=number, id_prefix=f"{number}:" if several else "", seen=seen, **options)
        for number, source in enumerate(sources)
    ]


def _describe(value: Any) -> str:
    return str(value) if isinstance(value, RowError) else f"it is of type {type(value).__name__}"


def _parse_rows(rows: Iterable[RawRow], layout: InputLayout, unused: Counter[str]) -> Iterator[tuple[RawRow, Parsed | RowError]]:
    for row in rows:
        try:
            if isinstance(row.value, RowError):
                raise row.value
            part = parse(row.value, layout)
            unused.update(part.unused)
            yield row, part
        except RowError as error:
            yield row, error
        except RecursionError:
            yield row, RowError("row", "is nested too deeply")


def _gather(parsed: Iterable[tuple[RawRow, Parsed | RowError]], spill: Spill) -> Iterator[tuple[RawRow, Parsed | RowError]]:
    """Join responses to the same prompt from several rows: unusable rows first, then groups in order of their first row."""
    for row, part in parsed:
        if isinstance(part, RowError):
            yield row, part
        else:
            spill.put(json.dumps([part.prompt, part.tools], sort_keys=True), (row.file, row.line, part))
    for rows in spill.take():
        file, line, first = rows[0]
        parts: list[Parsed] = [part for _, _, part in rows]
        rewards = tuple(reward for part in parts for reward in part.rewards or ())
        labels = tuple(label for part in parts for label in part.labels or ())
        yield (
            RawRow(file, line, None),
            Parsed(
                prompt=first.prompt,
                tools=first.tools,
                responses=tuple(response for part in parts for response in part.responses),
                rewards=rewards or None,
                labels=labels or None,
            ),
        )


def _build(
    parsed: Iterable[tuple[RawRow, Parsed | RowError]], seen: Spill, number: int, id_prefix: str
) -> Iterator[Group | Rejection]:
    """Groups with distinct ids."""
    for row, part in parsed:
        if isinstance(part, RowError):
            yield row.reject(part, _peek_id(row.value))
            continue
        where = f"{row.file}:{row.line}"
        if part.group_id is not None:
            part = replace(part, group_id=id_prefix + part.group_id)
        try:
            group = build_group(part, where, number)
        except RowError as error:
            yield row.reject(error, part.group_id)
            continue
        before = seen.first_place(group.group_id, where)
        if before is not None:
            what = "repeats the id" if part.group_id else "repeats the prompt, responses and rewards"
            yield row.reject(RowError("id", f"{what} of {before}"), group.group_id)
            continue
        yield group


def _peek_id(value: Any) -> str | None:
    """The id of a faulty row, for the report."""
    found = value.get("group_id", value.get("id")) if isinstance(value, dict) else None
    return str(found) if isinstance(found, str | int) else None

"""Rows as an input holds them, and rows that become no group."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mpo_megatron.data.fields import RowError, mark_written
from mpo_megatron.files.digests import LINE_DIGEST, check_record
from mpo_megatron.files.objects import RepeatedNameError, read_pairs

_PARTS = {"prompt", "tools"}
"""Parts of a line of ours that are read from a row before."""


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A row that cannot become a group."""

    file: str
    line: int
    """Line of the file, or row of the dataset, counted from 1."""
    group_id: str | None
    field: str
    reason: str

    def as_json(self) -> str:
        """One line of `rejected.jsonl`."""
        line = json.dumps(asdict(self), ensure_ascii=False)
        try:
            line.encode()
        except UnicodeEncodeError:  # half a surrogate pair, in an id for example: only its escape can be written
            return json.dumps(asdict(self))
        return line


class RawRow(NamedTuple):
    """One row as read."""

    file: str
    line: int
    value: Any
    """Undecoded JSON as bytes; decoded, or `RowError` where it cannot be."""

    def decode(self) -> RawRow:
        """The row with its value decoded."""
        return RawRow(self.file, self.line, _decode(self.value)) if isinstance(self.value, bytes) else self

    def reject(self, error: RowError, group_id: str | None = None) -> Rejection:
        """The rejection of this row."""
        return Rejection(file=self.file, line=self.line, group_id=group_id, field=error.field, reason=error.reason)


class Source(NamedTuple):
    """Rows of an input, and their approximate number."""

    total: int | None
    """None if only reading everything would tell."""
    rows: Iterable[RawRow]


def undecoded_lines(lines: Iterable[bytes], name: str) -> Iterator[RawRow]:
    """Rows of JSON lines that are not empty."""
    for number, line in enumerate(lines, start=1):
        if line := line.strip():
            yield RawRow(name, number, line)


def _unsealed(row: Any) -> Any:
    """A row; without the digest, if it is a line of ours; a `RowError` if that does not match."""
    is_ours = isinstance(row, dict) and LINE_DIGEST in row
    try:
        check_record(row)
    except ValueError as error:
        return RowError("row", f"is damaged or changed: {error}")
    return row | {name: mark_written(row[name]) for name in _PARTS & row.keys()} if is_ours else row


def _decode(line: bytes) -> Any:
    try:
        return _unsealed(json.loads(line.decode("utf-8-sig"), object_pairs_hook=read_pairs))
    except UnicodeDecodeError as error:
        return RowError("row", f"is not UTF-8 (byte {error.start}); save the file as UTF-8")
    except json.JSONDecodeError as error:
        return RowError("row", f"is not valid JSON: {error.msg} at character {error.pos + 1}")
    except RecursionError:
        return RowError("row", "is not usable JSON: nested too deeply")
    except RepeatedNameError as error:
        return RowError("row", f"is not usable JSON: {error}")
    except ValueError:  # Python refuses integers of more than 4,300 digits
        return RowError("row", "is not usable JSON: a number has thousands of digits")

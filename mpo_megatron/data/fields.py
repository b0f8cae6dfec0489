"""Read and check the values of a row: texts, numbers, labels, lists, ids. Each error has its own message."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from typing import Any

from mpo_megatron.config.values import LARGEST_REWARD
from mpo_megatron.data.field_record import FieldRecord

_NUMBER = re.compile(r"\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*", re.ASCII)
_WORDS = {"true": 1, "false": 0}
_PYTHON_MESSAGES = re.compile(r"""\s*\[?\{'(role|from|content|value)': ['"]""")
"""A message, or a list of them, formatted by `str`, which is never real text."""


class WrittenObject(dict[str, Any]):
    """An object whose null entries are meant: from JSON text in a row, or from a line of ours. Arrow adds some to others."""

    repeated: str | None = None
    """A name that its text gives twice; only the last value is here."""


class RowError(ValueError):
    """An unusable row or response; names the field and the reason."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason

    def __reduce__(self) -> tuple[Any, ...]:
        return (RowError, (self.field, self.reason))


def check_unicode(value: str, field: str) -> str:
    """The string, if UTF-8 can encode it."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(field, f"has half a surrogate pair at character {error.start}") from error
    return value


def read_text(value: Any, field: str) -> str:
    """A non-empty string that UTF-8 can encode."""
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, str):
        raise RowError(field, f"is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise RowError(field, "is empty")
    if _PYTHON_MESSAGES.match(value):
        raise RowError(field, "is a message, or a list of them, as Python prints it; write it as JSON (json.dumps)")
    return check_unicode(value, field)


def is_number(value: Any) -> bool:
    """Whether a value is a number, or a string that spells one; booleans are not."""
    if isinstance(value, str):
        return _NUMBER.fullmatch(value) is not None
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_number(value: Any, field: str) -> float:
    """A finite number; also accepts a numeric string ("4") and a boolean (1 or 0)."""
    if type(value) is float and -LARGEST_REWARD <= value <= LARGEST_REWARD:  # nearly all
        return value
    if value is None:
        raise RowError(field, "is missing")
    if isinstance(value, str):
        word = value.strip().lower()
        if not _NUMBER.fullmatch(word) and word not in _WORDS:
            raise RowError(field, f"is {value[:40]!r}, not a number")
        value = _WORDS[word] if word in _WORDS else float(word)
    if not isinstance(value, int | float):
        raise RowError(field, f"is of type {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(field, f"is {number}; a reward must be finite")
    if abs(number) > LARGEST_REWARD:
        raise RowError(field, f"is {number}; a reward must be within ±{LARGEST_REWARD:g}")
    return number


def read_label(value: Any, field: str) -> int:
    """1 (chosen) or 0 (rejected), in any spelling: 1, 1.0, "1", true, "true"."""
    if value is None:
        raise RowError(field, "is missing")
    try:
        number = read_number(value, field)
    except RowError:
        number = math.nan
    if number not in (0.0, 1.0):
        raise RowError(field, f"is {_show(value)}; a label is 1 (chosen) or 0 (rejected)")
    return int(number)


def _show(value: Any) -> str:
    return repr(value[:40]) if isinstance(value, str) else str(value)[:40]


def parse_json(value: Any, opening: str) -> Any:
    """The JSON value of a string that starts with `opening`; any other value unchanged."""
    if isinstance(value, str) and value.lstrip()[:1] == opening:
        try:
            return json.loads(value, object_pairs_hook=_read_written)
        except (ValueError, RecursionError):
            return value
    return value


def _read_written(pairs: list[tuple[str, Any]]) -> WrittenObject:
    found = WrittenObject(pairs)
    if len(found) < len(pairs):
        found.repeated = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
    return found


def check_names(value: Any, field: str) -> None:
    """Check that no object in a value from JSON text gives a name twice.

    Raises:
        RowError: one does.
    """
    if isinstance(value, WrittenObject):
        if value.repeated is not None:
            raise RowError(field, f"gives {value.repeated[:40]!r} twice")
        for item in value.values():
            check_names(item, field)
    elif isinstance(value, list):
        for item in value:
            check_names(item, field)


def split_columns(value: Any) -> Any:
    """The records in a dictionary of equally long lists (Arrow's form of a sequence of records); any other value unchanged."""
    if not (isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values())):
        return value
    if len({len(column) for column in value.values()}) != 1:
        return value
    return [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]


def read_list(value: Any, field: str) -> list[Any]:
    """A non-empty list, or the list in a JSON string.

    Converts a dictionary of equally long lists (Arrow's form of a sequence of records) to a list.
    """
    if value is None:
        raise RowError(field, "is missing")
    value = split_columns(parse_json(value, "["))
    if isinstance(value, str) and value.lstrip().startswith("["):
        raise RowError(field, "is a list as text, but not JSON; write it with json.dumps")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        raise RowError(field, "holds lists of different lengths")
    if not isinstance(value, list | tuple):
        raise RowError(field, f"is of type {type(value).__name__}, not a list")
    if not value:
        raise RowError(field, "is empty")
    return list(value)


def read_id(row: FieldRecord) -> str | None:
    """A row's own group id, if it has one."""
    name = row.find(("group_id", "id"))
    if name is None:
        return None
    value = row.get(name)
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError("id", f"is {_show(value)}; use a non-empty string or an integer")
    return check_unicode(str(value), "id")


def mark_written(value: Any) -> Any:
    """The value with all its objects as `WrittenObject`."""
    if isinstance(value, dict):
        return WrittenObject({key: mark_written(item) for key, item in value.items()})
    return [mark_written(item) for item in value] if isinstance(value, list) else value


def drop_nulls(value: Any, record: FieldRecord, place: str) -> Any:
    """The value without null entries: Arrow gives every record all keys of its column. Those of a `WrittenObject` stay.

    Args:
        record: reports that entries are dropped
        place: where in the record the value is
    """
    kept = _drop_nulls(value)
    if kept != value:
        record.leave_out(f"{place}: null entries")
    return kept


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, WrittenObject):
        return value
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value

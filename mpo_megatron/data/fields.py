"""A row's fields, read and checked one by one: text, numbers, lists, records, conversations. Each fault has its own message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mpo_megatron.data.group import Message

Row = Mapping[str, Any]

PROMPT_FIELDS = ("prompt", "messages", "instruction", "question")
_SYSTEM_FIELDS = ("system", "system_prompt")
_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "user": "user",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
}
_LARGEST = 1e30
"""Largest size of a reward: differences, squares and single precision still hold it."""


class RowError(ValueError):
    """A row that cannot become a group: the field at fault, and why."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field} {reason}")
        self.field, self.reason = field, reason


def read_text(value: Any, field: str) -> str:
    """A non-empty string that UTF-8 can hold."""
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, str):
        raise RowError(field, f"is of type {type(value).__name__}, not a string")
    if not value.strip():
        raise RowError(field, "is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RowError(field, f"has half a surrogate pair at character {error.start}") from error
    return value


def read_number(value: Any, field: str, *, from_text: bool = False) -> float:
    """A finite number; `from_text` also takes one written as a string ("4")."""
    if value is None:
        raise RowError(field, "is missing")
    if from_text and isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise RowError(field, f"is {value!r}, not a number") from None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowError(field, f"is of type {type(value).__name__}, not a number")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RowError(field, f"is {number}; a reward must be finite")
    if abs(number) > _LARGEST:
        raise RowError(field, f"is {number}; a reward must lie within ±{_LARGEST:g}")
    return number


def read_list(value: Any, field: str) -> list[Any]:
    """A non-empty list. A dictionary of equally long lists (how Arrow stores a sequence of records) is turned into one."""
    if value is None:
        raise RowError(field, "is missing")
    if isinstance(value, dict) and value and all(isinstance(column, list) for column in value.values()):
        if len({len(column) for column in value.values()}) != 1:
            raise RowError(field, "holds lists of different lengths")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list | tuple):
        raise RowError(field, f"is of type {type(value).__name__}, not a list")
    if not value:
        raise RowError(field, "is empty")
    return list(value)


def read_records(value: Any, field: str) -> list[Row]:
    """A non-empty list of records."""
    records = read_list(value, field)
    for index, item in enumerate(records):
        if not isinstance(item, dict):
            raise RowError(f"{field}[{index}]", f"is of type {type(item).__name__}, not a record")
    return records


def read_label(value: Any, field: str) -> int:
    """1 (chosen) or 0 (rejected), also as a truth value."""
    if value is None:
        raise RowError(field, "is missing")
    if not isinstance(value, bool | int) or int(value) not in (0, 1):
        raise RowError(field, f"is {value!r}; a label is 1 (chosen) or 0 (rejected)")
    return int(value)


def read_messages(value: Any, field: str, *, last_assistant: bool = False) -> tuple[Message, ...]:
    """A conversation: known roles, system only first, ending with the assistant's turn only if `last_assistant`."""
    messages: list[Message] = []
    for index, item in enumerate(read_list(value, field)):
        place = f"{field}[{index}]"
        if not isinstance(item, dict):
            raise RowError(place, f"is of type {type(item).__name__}, not a message")
        role = _ROLES.get(str(item.get("role", item.get("from"))))
        if role is None:
            raise RowError(f"{place}.role", f"is {item.get('role', item.get('from'))!r}; use system, user, assistant or tool")
        if role == "system" and index:
            raise RowError(f"{place}.role", "is system; only the first message can be")
        content = item.get("content", item.get("value"))
        if isinstance(content, list) and all(isinstance(part, dict) and part.get("type") == "text" for part in content):
            content = "".join(str(part.get("text", "")) for part in content)
        messages.append({"role": role, "content": read_text(content, f"{place}.content")})
    if (messages[-1]["role"] == "assistant") != last_assistant:
        wanted = "must end with the assistant's message" if last_assistant else "ends with an assistant message, not a question"
        raise RowError(field, wanted)
    if messages[-1]["role"] == "system":
        raise RowError(field, "has a system message and no question")
    return tuple(messages)


def read_prompt(row: Row, *, required: bool = True) -> tuple[Message, ...]:
    """The row's prompt, with its system message if it names one in a field of its own."""
    field = next((name for name in PROMPT_FIELDS if row.get(name) is not None), None)
    if field is None:
        if required:
            raise RowError("prompt", "is missing")
        return ()
    value = row[field]
    if isinstance(value, str):
        messages: tuple[Message, ...] = ({"role": "user", "content": read_text(value, field)},)
    else:
        messages = read_messages(value, field)
    system = next((row[name] for name in _SYSTEM_FIELDS if row.get(name)), None)
    if system is not None and messages[0]["role"] != "system":
        messages = ({"role": "system", "content": read_text(system, "system")}, *messages)
    return messages


def read_id(row: Row) -> str | None:
    """The id a row gives its group, if it does."""
    value = next((row[name] for name in ("group_id", "id") if row.get(name) is not None), None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, str | int) or not str(value).strip():
        raise RowError("id", f"is {value!r}; use a non-empty string or an integer")
    return read_text(str(value), "id")

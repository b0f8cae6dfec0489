"""Parts that the known formats share: responses in records, values in or beside them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mpo_megatron.data.conversations import as_messages, join_answers, read_answer
from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, check_names, read_id, read_list, read_number
from mpo_megatron.data.formats import Parsed, Responses, Sample
from mpo_megatron.data.group import Answer

_TEXTS = ("text", "response", "content", "answer", "completion", "output", "messages")
_MESSAGE_KEYS = frozenset(("role", "from", "tool_calls", "reasoning_content", "reasoning", "thinking", "tool_plan"))
"""Keys that make a record with a text a message."""


def read_item(row: FieldRecord, item: Any, place: str, name: str = "text") -> tuple[Answer, FieldRecord]:
    """A response given as text, as messages, or inside a record; and that record, for its other fields."""
    if not isinstance(item, dict):
        return read_answer(row, item, place), row.within({}, place)
    check_names(item, place)
    record = row.within(item, place)
    name = record.find(_TEXTS) or name
    text = record.get(name)
    keys = [] if _MESSAGE_KEYS.isdisjoint(item) else [key for key in item.keys() & _MESSAGE_KEYS if record.has(key)]
    if keys and not isinstance(as_messages(text), list):
        message = {"role": "assistant", "content": text} | {key: record.get(key) for key in keys}
        return read_answer(record, [message], place), record
    return read_answer(row, text, f"{place}.{name}"), record


def average(record: FieldRecord, names: Sequence[str]) -> float:
    """Mean of one record's named ratings; a name may also be an UltraFeedback aspect."""
    total = 0.0
    for name in names:
        aspects = record.values.get("annotations")
        if not record.has(name) and isinstance(aspects, dict) and isinstance(aspects.get(name), dict):
            record.get("annotations")
            aspect = record.within(aspects[name], f"annotations.{name}")
            rating = aspect.get(aspect.find(("Rating", "rating")) or "Rating")
            total += read_number(rating, f"{record.place}annotations.{name}.Rating")
        else:
            total += read_number(record.get(name), f"{record.place}{name}")
    return total / len(names)


class Column:
    """One value per response: from a list in the row, or from the responses themselves."""

    def __init__(
        self, row: FieldRecord, size: int, inner: Sequence[str], outer: Sequence[str], read: Callable[[Any, str], Any]
    ) -> None:
        self.inner, self.names, self.convert = inner, frozenset(inner), read
        self.outer = row.find(outer)
        self.values = None if self.outer is None else read_list(row.get(self.outer), self.outer)
        if self.values is not None and len(self.values) != size:
            raise RowError(str(self.outer), f"has {len(self.values)} values for {size} responses")

    def given(self, item: Any) -> bool:
        """Whether a response, or the row, gives a value at all."""
        return self.values is not None or (isinstance(item, dict) and not self.names.isdisjoint(item))

    def read(self, record: FieldRecord, index: int, default: str | None = None) -> Any:
        """The value of one response; if both places have one, they must agree."""
        name = record.find(self.inner)
        if self.values is None:
            name = name or next((name for name in self.inner if name in record.values), default or self.inner[0])
            return self.convert(record.get(name), f"{record.place}{name}")
        value = self.convert(self.values[index], f"{self.outer}[{index}]")
        if name is not None and self.convert(record.get(name), f"{record.place}{name}") != value:
            raise RowError(f"{self.outer}[{index}]", f"contradicts {record.place}{name}")
        return value


def finish(row: FieldRecord, found: Responses, places: Sequence[str], *, least: int = 2) -> Parsed:
    """The parts of a row whose responses have been read; a row with one response of its group (`least` 1) has no group's id."""
    found.require(least)
    if not found.responses:
        raise RowError("responses", "has K = 0 responses; a group needs at least two")
    prompt, responses = join_answers(row, list(zip(places, found.responses, strict=True)))
    return Parsed(
        prompt=prompt,
        responses=tuple(responses),
        rewards=tuple(found.rewards) or None,
        labels=tuple(found.labels) or None,
        group_id=read_id(row) if least > 1 else None,
        dropped=tuple(found.dropped),
    )


def empty_scores(sample: Sample, names: Sequence[str]) -> tuple[str, ...]:
    """Those score columns that exist, but are empty."""
    return tuple(name for name in names if name in sample.empty)

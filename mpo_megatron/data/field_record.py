"""A row that records which of its fields are read, so that all others can be reported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

_EMPTY: tuple[Any, ...] = ("", [], {}, "[]", "{}")
"""Values that say nothing, also as JSON text in a cell of a CSV file."""
_INDEX = re.compile(r"\[\d+\]")


class FieldRecord:
    """A row, or a record inside one. Fields never requested through `get` or `find` are unused."""

    __slots__ = ("inner", "left_out", "place", "used", "values")

    def __init__(self, values: Mapping[str, Any], place: str = "", parent: FieldRecord | None = None) -> None:
        self.values, self.place, self.used = values, place, set[str]()
        self.inner: list[FieldRecord] = []
        self.left_out: list[str] = []
        if parent is not None:
            parent.inner.append(self)

    def has(self, name: str) -> bool:
        """Whether a field has a value; does not count as reading it."""
        return self.values.get(name) is not None

    def get(self, name: str) -> Any:
        """The value of a field, None if it is absent."""
        self.used.add(name)
        return self.values.get(name)

    def find(self, names: Sequence[str]) -> str | None:
        """The first of these fields with a value; counts as reading it."""
        for name in names:
            if self.values.get(name) is not None:
                self.used.add(name)
                return name
        return None

    def within(self, value: Mapping[str, Any], place: str) -> FieldRecord:
        """A record that is part of this one, for example `responses[0]`."""
        return FieldRecord(value, f"{self.place}{place}.", self)

    def leave_out(self, name: str) -> None:
        """Report a part of a field that is read as unused."""
        self.left_out.append(name)

    def unread(self) -> Iterator[tuple[str, Any]]:
        """Place and value of each unread field that has a value; parts left out have none."""
        if not self.values.keys() <= self.used:
            for name, value in self.values.items():
                if name not in self.used and not says_nothing(value):
                    yield f"{self.place}{name}", value
        for name in self.left_out:
            yield f"{self.place}{name}", None
        for record in self.inner:
            yield from record.unread()


def says_nothing(value: Any) -> bool:
    """Whether a value is missing or empty."""
    return value is None or value in _EMPTY


def without_indices(place: str) -> str:
    """A place with list indices shown as `[]`."""
    return _INDEX.sub("[]", place)

"""Users' regular expressions on models' texts: Python syntax, with a time limit.

An expression such as `(a+)+$` takes longer than the age of the universe on a text of 60 characters. So it runs in a process that
the kernel ends. It uses Python's own `re`: other engines with time limits interpret some expressions differently.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

from mpo_megatron.data.bounded import Bounded, LimitError

CPU_SECONDS = 2.0
"""Seconds for an expression on one text, or on all of a group's texts; a usual one takes microseconds."""

TOO_SLOW = "pattern_too_slow"
"""Why a score is missing: the expression exceeded the time limit."""


def _apply(pattern: str, how: str, texts: Sequence[str]) -> list[Any]:
    compiled = re.compile(pattern)
    if how == "search":
        return [compiled.search(text) is not None for text in texts]
    if how == "fullmatch":
        return [compiled.fullmatch(text) is not None for text in texts]
    found = []
    for text in texts:
        last = None
        for last in compiled.finditer(text):  # noqa: B007 the last one counts
            pass
        found.append(None if last is None else (last[1] or "") if compiled.groups else last[0])
    return found


class Pattern:
    """A regular expression with a time limit."""

    def __init__(self, pattern: str, cpu_seconds: float = CPU_SECONDS) -> None:
        self.pattern = pattern
        self._apply = Bounded(_apply, cpu_seconds)

    def matches(self, texts: Sequence[str], *, full: bool) -> list[bool | LimitError]:
        """Whether it matches somewhere in each text (or the full text); a `LimitError` where it takes too long."""
        return self._each("fullmatch" if full else "search", texts)

    def last(self, texts: Sequence[str]) -> list[str | LimitError | None]:
        """The last match in each text, or its first group if it has one; None without, a `LimitError` if it takes too long."""
        return self._each("last", texts)

    def _each(self, how: Literal["search", "fullmatch", "last"], texts: Sequence[str]) -> list[Any]:
        try:
            return list(self._apply(self.pattern, how, list(texts)))
        except LimitError as error:
            if len(texts) <= 1:
                return [error] * len(texts)
            return [self._each(how, [text])[0] for text in texts]

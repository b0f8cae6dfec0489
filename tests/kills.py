"""Simulates a process that is killed at a chosen place, within this process."""

from __future__ import annotations

from typing import Any

import pytest


class Killed(BaseException):
    """Ends a command like a signal: the package never catches it."""


def raise_at(owner: Any, name: str, calls: int, patch: pytest.MonkeyPatch) -> None:
    """Let a function run this many times, and be killed in the next call."""
    original, left = getattr(owner, name), [calls]

    def killed(*arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            raise Killed(name)
        left[0] -= 1
        return original(*arguments, **options)

    patch.setattr(owner, name, killed)

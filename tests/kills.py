"""A process that is killed at a chosen place, played within this one."""

from __future__ import annotations

from typing import Any

import pytest


class Killed(BaseException):
    """Ends a command as a signal would: nothing of ours handles it."""


def raise_at(owner: Any, name: str, calls: int, patch: pytest.MonkeyPatch) -> None:
    """Let a function work so many times, and be killed in the next."""
    original, left = getattr(owner, name), [calls]

    def killed(*arguments: Any, **options: Any) -> Any:
        if left[0] == 0:
            raise Killed(name)
        left[0] -= 1
        return original(*arguments, **options)

    patch.setattr(owner, name, killed)

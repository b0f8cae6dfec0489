"""A problem of an installation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that does not work here, and its fix."""

    what: str
    cure: str
    """A command, or another fix."""
    severity: Literal["error", "warning"] = "error"
    """A warning costs speed or a feature; an error makes runs that need it fail."""

    def __str__(self) -> str:
        return f"{self.what}; {self.cure}"

"""Access options in nested sections, by names such as `optimizer.lr`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def has_option(section: Mapping[str, Any], name: str) -> bool:
    """Whether a section sets an option."""
    first, _, rest = name.partition(".")
    inner = section.get(first)
    return first in section and (not rest or (isinstance(inner, Mapping) and has_option(inner, rest)))


def set_option(section: dict[str, Any], name: str, value: object) -> None:
    """Set an option, and create missing sections."""
    first, _, rest = name.partition(".")
    if rest:
        set_option(section.setdefault(first, {}), rest, value)
    else:
        section[first] = value

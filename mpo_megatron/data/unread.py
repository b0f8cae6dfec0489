"""Parts of a row that no format reads, but that change what the model sees: refused by name, not only listed as unused."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from mpo_megatron.data.fields import RowError

_MEDIA = re.compile(r"((chosen|rejected|prompt)_)?(image|video|audio)s?")
_FILE = {"bytes", "path"}
"""Keys of an image or sound in a `datasets` column, whatever the column's name."""
_AS_TURNS = "is not read; it comes before a question given as text: write its turns as messages before the others"
_AS_CALLS = "is not read; write it as tool_calls, in OpenAI's form"
_AS_TOOLS = "is not read; write it as the row's column tools"
_REASONS = {
    "chat_template_kwargs": "sets the chat template's variables for one row, which is not supported; remove it, and set the "
    "option chat_template_kwargs for all rows",
    "function_call": _AS_CALLS,
    "function_calls": _AS_CALLS,
    "functions": _AS_TOOLS,
    "history": _AS_TURNS,
    "tools": _AS_TOOLS,
}


def check_unread(fields: Iterable[tuple[str, Any]]) -> None:
    """Check that no unread field holds a part of the conversation.

    Args:
        fields: unread fields, each its place and value

    Raises:
        RowError: one does; names it and what to do.
    """
    for place, value in fields:
        name = place.rpartition(".")[2]
        if _is_file(value) or (_MEDIA.fullmatch(name) and isinstance(value, str | bytes | list | dict)):
            raise RowError(place, "is not text, and only text is read; remove it to use the row's text alone")
        if name in _REASONS and _says_anything(value):
            raise RowError(place, _REASONS[name])


def _is_file(value: Any) -> bool:
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and first.keys() == _FILE


def _says_anything(value: Any) -> bool:
    """Whether a value holds more than empty texts and lists; a number or truth value alone describes, it is no part."""
    if isinstance(value, dict):
        return any(item is not None and item not in ("", [], {}) for item in value.values())
    return isinstance(value, str | list) and value not in ("", "[]", "{}", [])

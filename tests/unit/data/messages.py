"""Messages, a tool and its call, for rows of tests."""

from __future__ import annotations

from typing import Any

TOOL = {
    "type": "function",
    "function": {"name": "find", "parameters": {"type": "object", "properties": {"x": {"type": "string"}}}},
}


CALL = {"type": "function", "function": {"name": "find", "arguments": {"x": "1"}}}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str | None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def tool(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}

"""Tools that a row offers, and the calls in its messages."""

from __future__ import annotations

import json
from typing import Any

from mpo_megatron.data.field_record import FieldRecord
from mpo_megatron.data.fields import RowError, check_names, check_unicode, drop_nulls, parse_json, read_list


def read_calls(record: FieldRecord, value: Any, place: str) -> list[dict[str, Any]]:
    """A message's tool calls in OpenAI's form, with arguments as an object, as templates and inference engines use them."""
    calls = []
    for index, item in enumerate(read_list([value] if isinstance(value, dict) else value, place)):
        item = parse_json(item, "{")
        if not isinstance(item, dict):
            raise RowError(f"{place}[{index}]", f"is of type {type(item).__name__}, not a call")
        outer = {} if "function" not in item else {key: value for key, value in item.items() if key != "function"}
        function = item.get("function", item)
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError(f"{place}[{index}].function.name", "is missing")
        arguments = parse_json(function.get("arguments", function.get("parameters")), "{")
        for part in (item, arguments):
            check_names(part, f"{place}[{index}]")
        arguments = drop_nulls(arguments, record, "tool_calls") or {}
        function = {key: value for key, value in function.items() if key != "parameters" and value is not None}
        outer = {key: value for key, value in outer.items() if value is not None}
        calls.append({"type": "function", **outer, "function": {**function, "arguments": arguments}})
    _check_json(calls, place)
    return calls


def read_tools(row: FieldRecord) -> tuple[dict[str, Any], ...]:
    """The tools that a row offers; empty without such a column."""
    other = parse_json(row.get("rejected_tools"), "[")  # of ms-swift
    if other not in (None, "", []) and other != parse_json(row.values.get("tools"), "["):
        raise RowError("rejected_tools", "contradicts tools; both answers need the same")
    if not row.has("tools"):
        return ()
    value = row.get("tools")
    tools = parse_json(value, "[")
    if tools in ("", [], {}) or (isinstance(tools, str) and not tools.strip()):
        return ()
    found = []
    for index, item in enumerate(read_list([tools] if isinstance(tools, dict) and "name" in tools else tools, "tools")):
        item = parse_json(item, "{")
        if not isinstance(item, dict):
            raise RowError(f"tools[{index}]", f"is of type {type(item).__name__}, not an object")
        check_names(item, f"tools[{index}]")
        found.append(drop_nulls(item, row, "tools"))
    _check_json(found, "tools")
    return tuple(found)


def _check_json(value: Any, field: str) -> None:
    """Check that templates can write a value as JSON."""
    try:
        check_unicode(json.dumps(value, ensure_ascii=False, allow_nan=False), field)
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, RowError):
            raise
        raise RowError(field, f"cannot be written as JSON: {error}") from error

"""Null entries of tools, calls and tool results: meant in JSON text, added by Arrow in records."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mpo_megatron.data.formats import Parsed, detect, parse
from mpo_megatron.data.group import Group
from mpo_megatron.data.readers import read_groups
from mpo_megatron.files.digests import seal_line
from tests.unit.data.conftest import Writer
from tests.unit.data.messages import assistant, tool, user

UNIT = {"type": "object", "properties": {"unit": {"type": "string", "default": None}}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": UNIT}}
BARE = json.loads(json.dumps(TOOL).replace(', "default": null', ""))
ANSWERS = {"chosen": "A", "rejected": "B"}


def asked(arguments: Any, result: Any = "1") -> list[dict[str, Any]]:
    return [user("Q"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": arguments}}]), tool(result)]


def read(row: dict[str, Any]) -> Parsed:
    return parse(row, detect([row]))


def arguments_of(parsed: Parsed | Group) -> Any:
    return parsed.prompt[1]["tool_calls"][0]["function"]["arguments"]


@pytest.mark.parametrize("tools", [json.dumps([TOOL]), [json.dumps(TOOL)]], ids=["list", "items"])
def test_tools_as_text_stay_as_written(tools: Any) -> None:
    parsed = read({"prompt": "Q", "tools": tools} | ANSWERS)
    assert (parsed.tools, parsed.unused) == ((TOOL,), ())


def test_tools_as_objects_lose_nulls_by_name() -> None:
    parsed = read({"prompt": "Q", "tools": [TOOL]} | ANSWERS)
    assert (parsed.tools, parsed.unused) == ((BARE,), ("tools: null entries",))


def test_arguments_as_text_stay_as_written() -> None:
    parsed = read({"prompt": asked('{"unit": null, "x": {"y": null}}')} | ANSWERS)
    assert arguments_of(parsed) == {"unit": None, "x": {"y": None}}
    assert parsed.unused == ()


def test_arguments_as_objects_lose_nulls_by_name() -> None:
    parsed = read({"prompt": asked({"unit": None, "x": 1})} | ANSWERS)
    assert (arguments_of(parsed), parsed.unused) == ({"x": 1}, ("prompt[].tool_calls: null entries",))


def test_messages_as_text_stay_as_written() -> None:
    parsed = read({"prompt": json.dumps(asked({"unit": None}, {"x": None}))} | ANSWERS)
    assert arguments_of(parsed) == {"unit": None}
    assert parsed.prompt[2]["content"] == '{"x": null}'
    assert parsed.unused == ()


def test_results_as_objects_lose_nulls_by_name() -> None:
    parsed = read({"prompt": asked({}, {"x": None, "y": 1})} | ANSWERS)
    assert (parsed.prompt[2]["content"], parsed.unused) == ('{"y": 1}', ("prompt[].content: null entries",))


def test_a_call_s_own_null_fields_say_nothing() -> None:
    calls = [{"id": None, "type": None, "index": None, "function": {"name": "f", "arguments": "{}", "strict": None}}]
    parsed = read({"prompt": [user("Q"), assistant(None, tool_calls=calls), tool("1")]} | ANSWERS)
    (call,) = parsed.prompt[1]["tool_calls"]
    assert call == {"type": "function", "function": {"name": "f", "arguments": {}}}
    assert parsed.unused == ()


def test_json_lines_and_parquet_are_read_alike(tmp_path: Path, write_lines: Writer) -> None:
    rows = [
        {"prompt": asked({"unit": "C"}), "tools": [TOOL]} | ANSWERS,
        {"prompt": asked({"place": "Bonn"}), "tools": [TOOL]} | ANSWERS,
        {"prompt": asked('{"unit": null}'), "tools": json.dumps([TOOL])} | ANSWERS,
    ]
    for number, part in enumerate((rows[:2], rows[2:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"{number}.parquet")
        lines, table = (read_groups(source) for source in (write_lines(*part), str(tmp_path / f"{number}.parquet")))
        for one, other in zip(lines.items, table.items, strict=True):
            assert isinstance(one, Group)
            assert isinstance(other, Group)
            assert (one.prompt, one.tools, one.group_id) == (other.prompt, other.tools, other.group_id)


def test_a_line_of_ours_is_read_as_the_row_it_came_from(tmp_path: Path, write_lines: Writer) -> None:
    """Of `mpo generate`, whose prompts hold arguments and tools as objects."""
    row = {"prompt": asked('{"unit": null}'), "tools": json.dumps([TOOL])} | ANSWERS
    (group,) = read_groups(write_lines(row)).items
    assert isinstance(group, Group)
    responses = [{"text": "A", "reward": 1.0}, {"text": "B", "reward": 0.0}]
    line = {"group_id": "g", "prompt": list(group.prompt), "tools": list(group.tools), "responses": responses}
    (tmp_path / "ours.jsonl").write_bytes(seal_line(line))
    stream = read_groups(str(tmp_path / "ours.jsonl"))
    (again,) = stream.items
    assert isinstance(again, Group)
    assert (again.prompt, again.tools) == (group.prompt, group.tools)
    assert not stream.unused

"""Rows as people have them: what stands in them arrives, or is named."""

from __future__ import annotations

import gzip
import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from mpo_megatron.config import ConfigError, PrepareConfig, parse
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import InputLayout, Options, build_group, detect
from mpo_megatron.data.formats import parse as parse_row
from mpo_megatron.data.group import Group
from mpo_megatron.data.raw_rows import Rejection
from mpo_megatron.data.readers import read_groups, read_inputs
from mpo_megatron.files import DataError
from tests.unit.data.conftest import Writer
from tests.unit.data.messages import assistant, tool, user


def read(row: dict[str, Any], **options: Any) -> tuple[InputLayout, Group, tuple[str, ...]]:
    layout = detect([row], options=Options(**options))
    parsed = parse_row(row, layout)
    return layout, build_group(parsed, "rows.jsonl:1"), parsed.unused


def contents(group: Group) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Roles and words of the prompt; the responses, of messages their words."""
    words = [answer if isinstance(answer, str) else [part["content"] for part in answer] for answer in group.responses]
    return [(message["role"], message["content"]) for message in group.prompt], words


# ------------------------------------------------------------------------------------------ formats

CALLS = [{"type": "function", "function": {"name": "f", "arguments": {"x": k}}} for k in (1, 2)]


@pytest.mark.parametrize("role", ["function_call", "tool_call"])
def test_calls_as_messages_of_their_own(role: str) -> None:
    """Of ShareGPT and ms-swift: parallel calls are one message for templates, with the words before them."""
    said = [{"role": role, "content": json.dumps(call["function"])} for call in CALLS]
    turns = [user("Q"), assistant("I look."), *said, tool("r"), tool("s"), assistant("A")]
    group = read({"messages": turns, "rejected_response": "B"})[1]
    assert group.prompt == (user("Q"), assistant("I look.", tool_calls=CALLS), tool("r"), tool("s"))
    group = read({"prompt": [user("Q")], "chosen": said, "rejected": "B"})[1]
    assert group.responses == ((assistant(None, tool_calls=CALLS),), "B")
    rows = [{"messages": [user("Q"), *said], "label": True}, {"messages": [user("Q"), assistant("B")], "label": False}]
    assert detect(rows).format == "unpaired"


def test_content_beside_calls() -> None:
    for content, words in ((None, None), ("", ""), ([], None), ("I look.", "I look.")):
        row = {"prompt": "Q", "chosen": [assistant("") | {"content": content, "tool_calls": CALLS}], "rejected": "B"}
        assert read(row)[1].responses == ((assistant(words, tool_calls=CALLS),), "B")
    for wrong in (0, False, {}):
        with pytest.raises(RowError, match=rf"chosen\[0\].content is of type {type(wrong).__name__}, not a string"):
            read({"prompt": "Q", "chosen": [assistant("") | {"content": wrong, "tool_calls": CALLS}], "rejected": "B"})


def test_messages_as_lists_of_roles_and_contents() -> None:
    """Arrow's form of a sequence of records."""
    chosen, rejected = ({"role": ["user", "assistant"], "content": ["Q", words]} for words in "AB")
    group = read({"chosen": chosen, "rejected": rejected})[1]
    assert contents(group) == ([("user", "Q")], [["A"], ["B"]])


def test_conversations_of_two_models() -> None:
    sides = {f"conversation_{name}": [user("Q"), assistant(name.upper())] for name in "ab"}
    layout, group, _ = read(sides | {"winner": "model_b"})
    assert (layout.format, contents(group), group.labels) == ("comparison", ([("user", "Q")], [["A"], ["B"]]), (0, 1))
    with pytest.raises(RowError, match="winner is 'tie'; it must be a or b"):
        read(sides | {"winner": "tie"})


def test_system_messages_in_two_columns() -> None:
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "system": "S"}
    assert read(row | {"system_prompt": "S"})[2] == ()
    assert contents(read(row | {"system": " ", "system_prompt": "T"})[1])[0] == [("system", "T"), ("user", "Q")]
    with pytest.raises(RowError, match="system_prompt contradicts system"):
        read(row | {"system_prompt": "T"})


def test_a_blank_input_says_nothing() -> None:
    row = {"instruction": "Q", "input": " \n", "chosen": "A", "rejected": "B"}
    assert contents(read(row)[1])[0] == [("user", "Q")]


def test_tools_of_one_answer_only() -> None:
    row = {"messages": [user("Q"), assistant("A")], "rejected_response": "B", "tools": '[{"name": "f"}]'}
    for same in (row["tools"], [{"name": "f"}], "", []):
        assert read(row | {"rejected_tools": same})[2] == ()
    with pytest.raises(RowError, match="rejected_tools contradicts tools"):
        read(row | {"rejected_tools": '[{"name": "g"}]'})


@pytest.mark.parametrize(
    ("row", "name", "prompt", "rewards", "labels"),
    [
        ({"instruction": "Q", "input": "X", "history": [["a", "b"]], "system": "S", "chosen": "A", "rejected": "B"},
         "pairs", [("system", "S"), ("user", "a"), ("assistant", "b"), ("user", "Q\nX")], None, (1, 0)),
        ({"instruction": "Q", "input": "", "history": "[]", "responses": ["A", "B"], "rewards": [1, 0]},
         "groups", [("user", "Q")], (1.0, 0.0), None),
        ({"prompt": "\n\nHuman: Q\n\nAssistant: a\n\nHuman: R\n\nAssistant:", "responses": ["A", "B"], "rewards": [1, 0]},
         "groups", [("user", "Q"), ("assistant", "a"), ("user", "R")], (1.0, 0.0), None),
        ({"prompt": json.dumps([user("Q")]), "responses": json.dumps(["A", "B"]), "rewards": "[1, 0]"},
         "groups", [("user", "Q")], (1.0, 0.0), None),
        ({"prompt": "Q", "answers": ["A", "B"], "ranks": [2, 1]}, "groups", [("user", "Q")], (-2.0, -1.0), None),
        ({"context": [user("Q")], "response1": "A", "response2": "B", "overall_preference": -2},
         "comparison", [("user", "Q")], (1.0, -1.0), None),
        ({"prompt": "Q", "response_1": "A", "response_2": "B", "preference_strength": "3"},
         "comparison", [("user", "Q")], (-1.5, 1.5), None),
        ({"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1, "safer_response_id": 0},
         "comparison", [("user", "Q")], None, (0, 1)),
        ({"trajectory": [{"from": "user", "value": "Q"}], "chosen": "A", "rejected": "B"},
         "pairs", [("user", "Q")], None, (1, 0)),
        ({"conversations": [{"from": "human", "value": "Q"}], "chosen": {"from": "gpt", "value": "A"},
          "rejected": {"from": "gpt", "value": "B"}}, "pairs", [("user", "Q")], None, (1, 0)),
        ({"messages": [user("Q"), assistant("A")], "rejected_response": "B", "system": "S"},
         "pairs", [("system", "S"), ("user", "Q")], None, (1, 0)),
        ({"messages": [user("Q"), assistant("A")], "rejected_messages": [user("Q"), assistant("B")]},
         "pairs", [("user", "Q")], None, (1, 0)),
        ({"prompt": "Q", "chosen": ["A"], "rejected": ["B", "C"]}, "pairs", [("user", "Q")], None, (1, 0, 0)),
        ({"prompt": "Q", "responses": [{"role": "assistant", "content": "A", "reward": 1}, {"text": "B", "reward": 0}]},
         "groups", [("user", "Q")], (1.0, 0.0), None),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_forms_that_people_have(row: Any, name: str, prompt: Any, rewards: Any, labels: Any) -> None:
    layout, group, _ = read(row)
    assert layout.format == name
    said, words = contents(group)
    assert said == prompt
    flat = [part[0] if isinstance(part, list) else part for part in words]
    assert flat == ["A", "B", "C"][: len(flat)]
    assert (group.rewards, group.labels) == (rewards, labels)


def test_rows_of_one_response_with_a_label_make_groups(write_lines: Writer) -> None:
    rows = [{"prompt": "Q", "completion": text, "label": label} for text, label in (("A", True), ("B", "false"), ("C", 1.0))]
    rows += [{"instruction": "Q", "input": "", "output": "D", "kto_tag": False}]
    rows += [{"messages": [user("R"), assistant(text)], "label": label} for text, label in (("E", 1), ("F", 0))]
    (first, second) = read_groups(write_lines(*rows)).items
    assert isinstance(first, Group)
    assert isinstance(second, Group)
    assert (first.responses, first.labels, first.rewards) == (("A", "B", "C", "D"), (1, 0, 1, 0), None)
    assert contents(second) == ([("user", "R")], [["E"], ["F"]])


def test_ranks_are_left_out_by_choice(write_lines: Writer) -> None:
    row = {"prompt": "Q", "answers": [{"answer": text, "rank": rank} for text, rank in (("A", 1), ("B", 2), ("C", 3.0))]}
    layout, group, _ = read(row, drop_ranks=(2,))
    assert (group.responses, group.rewards, layout.reward_kind) == (("A", "C"), (-1.0, -3.0), "ranks")
    with pytest.raises(DataError, match=r"drop_ranks = \[2\]; it applies to format nectar only, but this is pairs"):
        read({"prompt": "Q", "chosen": "A", "rejected": "B"}, drop_ranks=(2,))


def test_a_choice_of_what_is_compared() -> None:
    row = {"prompt": "Q", "response_0": "A", "response_1": "B", "better_response_id": 1, "safer_response_id": 0}
    assert read(row, ratings=("safer_response_id",))[1].labels == (1, 0)
    with pytest.raises(RowError, match="better_response_id is '7'; it must be 0 or 1, for response_0 or response_1"):
        read(row | {"better_response_id": 7})


# ------------------------------------------------------------------------------------------ nothing vanishes


def test_what_is_not_used_is_named() -> None:
    row = {
        "prompt": [user("Q") | {"weight": 1}],
        "responses": [{"text": "A", "reward": 1, "model": "m"}, {"text": "B", "reward": 0, "model": None}],
        "source": "web",
        "note": "",
    }
    assert sorted(read(row)[2]) == ["prompt[].weight", "responses[].model", "source"]
    chosen = {"chosen": [user("Q"), assistant("A")], "rejected": [user("Q"), assistant("B")]}
    assert read(chosen | {"prompt": "Q", "messages": [user("Q"), assistant("A")], "score_chosen": 1.0, "score_rejected": 0})[
        2
    ] == ("messages",)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "Sky?", "chosen": [user("Sea?"), assistant("A")], "rejected": [user("Sea?"), assistant("B")]},
         "chosen contradicts prompt: it belongs to another conversation"),
        ({"prompt": [user("Sky?")], "chosen": [user("Sea?"), assistant("A")], "rejected": [user("Sea?"), assistant("B")]},
         "chosen contradicts prompt: it belongs to another conversation"),
        ({"prompt": "Q", "responses": [{"text": "A", "reward": 1}, {"text": "B", "reward": 0}], "rewards": [1, 2]},
         r"rewards\[1\] contradicts responses\[1\].reward"),
        ({"prompt": [{"role": "system", "content": "S"}, user("Q")], "system": "T", "chosen": "A", "rejected": "B"},
         r"system contradicts the system message in prompt\[0\]"),
        ({"prompt": [user("Q")], "chosen": [assistant("A", reasoning="x", reasoning_content="y")], "rejected": "B"},
         r"chosen\[0\].reasoning contradicts chosen\[0\].reasoning_content"),
    ],
)  # fmt: skip
def test_contradictions_name_both_places(row: Any, message: str) -> None:
    with pytest.raises(RowError, match=message):
        read(row)


@pytest.mark.parametrize(
    "prompt",
    ["R", [user("Q"), assistant("a"), user("R")], "Q", None, [user("Q")]],
    ids=["last", "all", "first", "none", "beginning"],
)
def test_a_prompt_beside_whole_conversations(prompt: Any) -> None:
    turns = [user("Q"), assistant("a"), user("R")]
    row = {"prompt": prompt, "chosen": [*turns, assistant("A")], "rejected": [*turns, assistant("B")]}
    assert contents(read(row)[1]) == ([("user", "Q"), ("assistant", "a"), ("user", "R")], [["A"], ["B"]])


def test_what_answers_of_several_messages_share_is_part_of_the_prompt() -> None:
    turns = [assistant("call"), tool("blue")]
    row = {"prompt": [user("Q")], "chosen": [*turns, assistant("A")], "rejected": [*turns, assistant("B")]}
    assert contents(read(row)[1]) == ([("user", "Q"), ("assistant", "call"), ("tool", "blue")], [["A"], ["B"]])
    other = {
        "prompt": [user("Q")],
        "chosen": [*turns, assistant("A")],
        "rejected": [assistant("no call"), tool("blue"), assistant("B")],
    }
    assert contents(read(other)[1]) == ([("user", "Q")], [["call", "blue", "A"], ["no call", "blue", "B"]])


# ------------------------------------------------------------------------------------------ values


@pytest.mark.parametrize("one", [1, 1.0, "1", True, "true", "1.0"])
def test_numbers_labels_and_ids_in_any_spelling(one: Any) -> None:
    zero = type(one)(0) if not isinstance(one, str) else {"1": "0", "true": "false", "1.0": "0.0"}[one]
    row = {"prompt": "Q", "responses": ["A", "B"], "rewards": [one, zero], "labels": [one, zero], "id": 7.0}
    group = read(row)[1]
    assert (group.rewards, group.labels, group.group_id) == ((1.0, 0.0), (1, 0), "7")


def test_an_unusable_response_leaves_its_group() -> None:
    items = [{"text": "A", "reward": 1}, {"text": "", "reward": 0}, {"text": "C", "reward": "N/A"}, {"text": "D", "reward": 0}]
    group = read({"prompt": "Q", "responses": items})[1]
    assert (group.responses, group.rewards) == (("A", "D"), (1.0, 0.0))
    assert group.dropped == ("responses[1].text is empty", "responses[2].reward is 'N/A', not a number")
    with pytest.raises(RowError, match=r"responses\[1\].text is empty"):
        read({"prompt": "Q", "responses": items[:2]})


# ------------------------------------------------------------------------------------------ sources

ROWS = [{"prompt": f"Q{index}", "responses": ["A", "B"], "rewards": [index, -1]} for index in range(6)]


def firsts(items: Any) -> list[float]:
    return [item.rewards[0] for item in items]


def test_compressed_files_patterns_and_standard_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data))
    (tmp_path / "b.jsonl.zst").write_bytes(pa.compress(data, "zstd", asbytes=True))
    for name in ("a.jsonl.gz", "b.jsonl.zst"):
        assert firsts(read_groups(str(tmp_path / name)).items) == [0, 1, 2, 3, 4, 5]
    half = len(data) // 2
    (tmp_path / "x-1.jsonl").write_bytes(b"".join(data.splitlines(True)[:2]))
    (tmp_path / "x-2.jsonl").write_bytes(b"".join(data.splitlines(True)[2:]))
    assert firsts(read_groups(str(tmp_path / "x-*.jsonl")).items) == [0, 1, 2, 3, 4, 5]
    with pytest.raises(DataError, match="no file matches this pattern"):
        read_groups(str(tmp_path / "y-*.jsonl"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data)[: half // 4])
    with pytest.raises(DataError, match=r"a.jsonl.gz: cannot be read after line \d+: .*damaged or truncated"):
        list(read_groups(str(tmp_path / "a.jsonl.gz")).items)
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(data)))
    assert firsts(read_groups("-").items) == [0, 1, 2, 3, 4, 5]


def test_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        'prompt,response,helpfulness\n"Q, and\nmore",A,3\n"Q, and\nmore",B,1.5\nshort\nR,"[1, 2]",2\nR,"say ""hi""",4\n'
    )
    items = list(read_groups(str(path)).items)
    groups = [item for item in items if isinstance(item, Group)]
    assert [(group.prompt[0]["content"], group.responses, group.rewards) for group in groups] == [
        ("Q, and\nmore", ("A", "B"), (3.0, 1.5)),
        ("R", ("[1, 2]", 'say "hi"'), (2.0, 4.0)),
    ]
    assert [(item.line, item.reason) for item in items if isinstance(item, Rejection)] == [
        (6, "has 1 cells, but the header has 3")
    ]
    tabs = tmp_path / "rows.tsv"
    tabs.write_text("prompt\tchosen\trejected\nQ\tA\tB\n")
    assert [item.responses for item in read_groups(str(tabs)).items if isinstance(item, Group)] == [("A", "B")]


def test_names_of_splits(tmp_path: Path) -> None:
    for name in ("train_prefs-00000-of-00002", "train_prefs-00001-of-00002", "train_sft-00000-of-00001", "test_prefs"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match=r"split = train; .* holds the splits train_prefs, train_sft; name one"):
        read_groups(str(tmp_path))
    assert read_groups(str(tmp_path), split="train_prefs").total == 2
    assert read_groups(str(tmp_path), split="test").total == 1


def test_files_whose_names_tell_no_split(tmp_path: Path) -> None:
    for name in ("train_extra", "code", "math"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    with pytest.raises(DataError, match=r"split = train; .* holds code.jsonl, math.jsonl, whose names tell no split; name one"):
        read_groups(str(tmp_path))
    (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)) + "\n")
    assert read_groups(str(tmp_path)).total == len(ROWS)


def test_columns_are_mapped(write_lines: Writer) -> None:
    path = write_lines({"Frage": "Q", "Antworten": ["A", "B"], "Noten": [1, 0], "prompt": "other"})
    columns = {"prompt": "Frage", "responses": "Antworten", "rewards": "Noten"}
    [group] = read_groups(path, columns=columns).items
    assert isinstance(group, Group)
    assert (contents(group), group.rewards) == (([("user", "Q")], ["A", "B"]), (1.0, 0.0))
    stream = read_groups(path, columns=columns)
    assert [len(list(stream.items)), dict(stream.unused)] == [1, {"prompt (replaced by Frage)": 1}]
    with pytest.raises(DataError, match=r"columns: rewards = Note; .* has no such column .*found \['Antworten', .*\]"):
        read_groups(path, columns=columns | {"rewards": "Note"})
    config = parse(
        PrepareConfig, ["--input", "a", "--output", "o", "--tokenizer", "t", "--columns", "prompt=Frage", "rewards=Noten"]
    )
    assert config.columns == {"prompt": "Frage", "rewards": "Noten"}
    several = parse(PrepareConfig, ["--input", "a", "--output", "o", "--tokenizer", "t", "--input", "b", "--weights", "1", "0.5"])
    assert (several.inputs, several.weights) == (["a", "b"], [1.0, 0.5])
    with pytest.raises(ConfigError, match=r"--input.*: expected one argument"):
        parse(PrepareConfig, ["--input", "a", "--output", "o", "--tokenizer", "t", "--input"])
    with pytest.raises(ConfigError, match="there are 2 inputs; give one weight for each"):
        PrepareConfig(input=["a", "b"], output="o", tokenizer="t", weights=[1.0])
    with pytest.raises(ConfigError, match=r"chat_template_kwargs = .* with prompt_format = templated: prompts are used"):
        PrepareConfig(input="i", output="o", tokenizer="t", chat_template_kwargs={"x": 1}, prompt_format="templated")
    with pytest.raises(ConfigError, match="system_prompt = S with prompt_format = templated: prompts are used unchanged"):
        PrepareConfig(input="a", output="o", tokenizer="t", prompt_format="templated", system_prompt="S")


def test_several_inputs_have_ids_of_their_own(write_lines: Writer) -> None:
    first = write_lines(ROWS[0] | {"id": "x"}, ROWS[1], name="a.jsonl")
    second = write_lines({"id": "x", "prompt": "P", "chosen": "A", "rejected": "B"}, name="b.jsonl")
    third = write_lines(ROWS[1], name="c.jsonl")
    streams = read_inputs([first, second, third])
    items = [item for stream in streams for item in stream.items]
    assert [item.group_id for item in items if isinstance(item, Group)][::2] == ["0:x", "1:x"]
    assert [item.reason for item in items if isinstance(item, Rejection)] == [
        f"repeats the prompt, responses and rewards of {first}:2"
    ]
    assert [stream.layout.format for stream in streams] == ["groups", "pairs", "groups"]


TWICE = '"content": "A", "content": "B"'
CALLED = [user("Q"), assistant(None, tool_calls=[{"function": {"name": "f", "arguments": '{"x": 1, "x": 2}'}}]), tool("1")]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        ({"prompt": f'[{{"role": "user", {TWICE}}}]', "chosen": "A", "rejected": "B"}, "prompt[0] gives 'content' twice"),
        ({"prompt": f'{{"role": "user", {TWICE}}}', "chosen": "A", "rejected": "B"}, "prompt[0] gives 'content' twice"),
        (
            {"prompt": "Q", "responses": '[{"text": "A", "reward": 1, "reward": 2}, "B", "C"]'},
            "responses[0] gives 'reward' twice",
        ),
        ({"prompt": "Q", "tools": '[{"a": {"b": 1, "b": 2}}]', "chosen": "A", "rejected": "B"}, "tools[0] gives 'b' twice"),
        ({"prompt": CALLED, "chosen": "A", "rejected": "B"}, "prompt[1].tool_calls[0] gives 'x' twice"),
    ],
)
def test_a_name_given_twice_in_json_text_is_refused(row: dict[str, Any], error: str) -> None:
    """As in a line of its own: otherwise, the last value counts."""
    with pytest.raises(RowError) as caught:
        raise parse_row(row, detect([row])).dropped[0]
    assert str(caught.value) == error


def test_an_answer_that_is_json_may_give_a_name_twice() -> None:
    _, group, _ = read({"prompt": "Q", "chosen": '{"x": 1, "x": 2}', "rejected": "B"})
    assert group.responses == ('{"x": 1, "x": 2}', "B")

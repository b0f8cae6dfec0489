"""Rows as people have them: what stands in them arrives, or is named."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, PrepareConfig, parse
from mpo_megatron.data.fields import RowError
from mpo_megatron.data.formats import InputLayout, Options, build_group, detect
from mpo_megatron.data.formats import parse as parse_row
from mpo_megatron.data.group import Group
from mpo_megatron.data.prepare import PrepareSummary, prepare
from mpo_megatron.data.readers import read_groups, read_inputs
from mpo_megatron.data.sources import Rejection
from mpo_megatron.data.store import StoredGroups, load_groups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.data.tokenizer_backends import HuggingFaceTokenizer
from mpo_megatron.files import DataError
from tests.unit.data.conftest import train_bpe
from tests.unit.data.templates import SPECIAL, read_template

Writer = Callable[..., str]
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


def read(row: dict[str, Any], **options: Any) -> tuple[InputLayout, Group, tuple[str, ...]]:
    layout = detect([row], options=Options(**options))
    parsed = parse_row(row, layout)
    return layout, build_group(parsed, "rows.jsonl:1"), parsed.unused


def contents(group: Group) -> tuple[list[tuple[str, Any]], list[Any]]:
    """Roles and words of the prompt; the responses, of messages their words."""
    words = [answer if isinstance(answer, str) else [part["content"] for part in answer] for answer in group.responses]
    return [(message["role"], message["content"]) for message in group.prompt], words


# ------------------------------------------------------------------------------------------ formats


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


def test_columns_are_mapped(write_lines: Writer) -> None:
    path = write_lines({"Frage": "Q", "Antworten": ["A", "B"], "Noten": [1, 0], "prompt": "other"})
    columns = {"prompt": "Frage", "responses": "Antworten", "rewards": "Noten"}
    [group] = read_groups(path, columns=columns).items
    assert isinstance(group, Group)
    assert (contents(group), group.rewards) == (([("user", "Q")], ["A", "B"]), (1.0, 0.0))
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


# ------------------------------------------------------------------------------------------ mpo prepare


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train_bpe(tmp_path_factory.mktemp("bpe"), SPECIAL)


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Callable[..., tuple[PrepareSummary, StoredGroups, str]]:
    def call(source: Any, *, template: str | None = None, output: str = "out", **options: Any) -> Any:
        if template is not None:
            (tmp_path / "template.jinja").write_text(read_template(template))
            options["chat_template"] = str(tmp_path / "template.jinja")
        config = PrepareConfig(input=source, output=str(tmp_path / output), tokenizer=str(model), check_every=1, **options)
        out = io.StringIO()
        summary = prepare(config, Console(file=out, width=200, color_system=None))
        return summary, load_groups(tmp_path / output), out.getvalue()

    return call


def shown(model: Path, groups: StoredGroups, index: int = 0) -> tuple[str, list[str]]:
    tokenizer = load_tokenizer(model)
    group = groups[index]
    return tokenizer.decode(group.prompt_tokens.tolist()), [tokenizer.decode(ids.tolist()) for ids in group.response_tokens]


def test_tools_calls_and_thoughts_are_rendered(run: Any, model: Path, write_lines: Writer) -> None:
    row = {
        "prompt": [user("Q")],
        "tools": json.dumps([TOOL | {"strict": None}]),
        "chosen": [
            assistant("", tool_calls=[CALL | {"function": {"name": "find", "arguments": '{"x": "1"}'}}], reasoning_content="Hm.")
        ],
        "rejected": [assistant("No.")],
        "extra": 1,
    }
    summary, groups, printed = run(write_lines(row), template="qwen3")
    prompt, answers = shown(model, groups)
    assert json.dumps(TOOL) in prompt
    wanted = '<think>\nHm.\n</think>\n\n<tool_call>\n{"name": "find", "arguments": {"x": "1"}}\n</tool_call><|im_end|>'
    assert answers == [wanted, "<think>\n\n</think>\n\nNo.<|im_end|>"]
    assert summary.tally.unused == Counter({"extra": 1})
    assert groups.info.statistics["preparation"]["unused_columns"] == {"extra": 1}
    assert "extra: 1 rows" in printed
    assert f"⟦{wanted}⟧" in printed
    assert summary.tally.checked == 1


def test_parts_that_the_template_does_not_write(run: Any, write_lines: Writer) -> None:
    thought = {"prompt": [user("Q")], "responses": [[assistant("A", reasoning_content="hm")], "B", "C"], "rewards": [2, 1, 0]}
    summary, groups, printed = run(write_lines(thought | {"tools": [TOOL]}), template="gemma")
    assert groups[0].num_responses == 2
    assert dict(summary.tally.dropped) == {"responses": 1}
    wanted = "responses[0].reasoning_content is omitted by the chat template, and would be lost"
    assert summary.tally.examples["dropped responses"].endswith(wanted)
    assert "tools: 1 groups" in printed
    assert summary.tally.not_written == Counter({"tools": 1})


def test_one_end_token(run: Any, model: Path, write_lines: Writer) -> None:
    row = {
        "prompt": "Q",
        "responses": ["A<|im_end|>\n", "B<|endoftext|>", "C <|im_end|><|endoftext|>", "D"],
        "rewards": [3, 2, 1, 0],
    }
    _, groups, _ = run(write_lines(row))
    assert shown(model, groups)[1] == ["A<|im_end|>", "B<|im_end|>", "C <|im_end|>", "D<|im_end|>"]


@pytest.mark.parametrize("template", ["deepseek_r1_distill", "qwen3_thinking", "qwen3_6"])
def test_a_thought_is_opened_once(run: Any, model: Path, write_lines: Writer, template: str) -> None:
    rows = [
        {"prompt": "Q", "responses": ["<think>\nhm\n</think>\n\nA", "hm\n</think>\n\nB", "never closed"], "rewards": [2, 1, 0]},
        {"prompt": "R", "responses": [[assistant("A", reasoning_content="hm")], [assistant("B")]], "rewards": [1, 0]},
    ]
    summary, groups, _ = run(write_lines(*rows), template=template)
    prompt, answers = shown(model, groups)
    end = load_tokenizer(model).decode([groups.info.end_token_ids[0]])
    assert prompt.endswith("<think>\n")
    assert answers == [f"hm\n</think>\n\nA{end}", f"hm\n</think>\n\nB{end}", f"never closed{end}"]
    assert (summary.tally.repeated_thoughts, summary.tally.open_thoughts) == (1, 1)
    assert [answer.removesuffix(end) for answer in shown(model, groups, 1)[1]] == ["hm\n</think>\n\nA", "\n</think>\n\nB"]


def test_a_thought_behind_a_closed_one_is_refused(run: Any, write_lines: Writer) -> None:
    row = {"prompt": "Q", "responses": ["<think>\nhm\n</think>\n\nA", "<think>\n\n</think>\n\nB", "C"], "rewards": [2, 1, 0]}
    summary, groups, _ = run(write_lines(row), template="qwen3", chat_template_kwargs={"enable_thinking": False})
    assert summary.tally.dropped == Counter({"responses": 1})
    assert groups[0].num_responses == 2
    assert "has a thought, but the prompt closes it" in summary.tally.examples["dropped responses"]


def test_a_templated_prompt_stops_the_run_or_is_taken_as_it_is(run: Any, model: Path, write_lines: Writer) -> None:
    text = "<|im_start|>user\nSky?<|im_end|>\n<|im_start|>assistant\n"
    path = write_lines({"prompt": text, "responses": ["A", "B"], "rewards": [1, 0]})
    with pytest.raises(
        ConfigError, match=r"1 of the first 1 prompts look as if a chat template had already been applied .*im_start.*user.*; set"
    ):
        run(path)
    _, groups, _ = run(path, prompt_format="templated")
    assert shown(model, groups)[0] == text
    summary, _, printed = run(path, prompt_format="chat", output="again")
    assert summary.tally.templated_prompts == 1
    assert "WARNING: 1 prompts look as if a chat template had already been applied" in printed


def test_only_the_assistants_tokens_are_scored(run: Any, model: Path, write_lines: Writer) -> None:
    turns = [[assistant(None, tool_calls=[CALL]), tool(f"result {k}"), assistant(f"Answer {k}.")] for k in range(2)]
    turns[1][0] = assistant("I look.")
    _, groups, printed = run(
        write_lines({"prompt": [user("Q")], "chosen": turns[0], "rejected": turns[1], "tools": [TOOL]}), template="qwen2_5"
    )
    group = groups[0]
    assert group.scored is not None
    tokenizer = load_tokenizer(model)
    unscored = [tokenizer.decode(ids[~mask].tolist()) for ids, mask in zip(group.response_tokens, group.scored, strict=True)]
    assert unscored == [
        f"\n<|im_start|>user\n<tool_response>\nresult {k}\n</tool_response><|im_end|>\n<|im_start|>assistant\n" for k in range(2)
    ]
    assert "⟦Answer 1.<|im_end|>⟧" in printed


def test_scores_that_first_appear_late_are_seen(run: Any, write_lines: Writer, tmp_path: Path) -> None:
    pairs = [{"prompt": f"Q{index}", "chosen": "A", "rejected": "B"} for index in range(70)]
    for index in range(66, 70):
        pairs[index] |= {"chosen_score": "2", "rejected_score": 1}
    summary, groups, printed = run(write_lines(*pairs))
    assert (groups.info.reward_kind, len(groups)) == ("scores", 4)
    assert "WARNING: 94% of the rows were rejected" in printed
    assert summary.tally.rejected == Counter({"rewards": 66})
    lines = (tmp_path / "out" / "rejected.jsonl").read_text().splitlines()
    assert json.loads(lines[0])["reason"] == "are missing, but 4 other groups have them"
    empty = [row | {"chosen_score": None, "rejected_score": None} for row in pairs[:3]]
    summary, groups, printed = run(write_lines(*empty), output="empty")
    assert groups.info.reward_kind == "labels"
    assert "chosen_score and rejected_score: empty in the first rows; labels are used instead of rewards" in printed


def test_inputs_are_mixed_by_weight(run: Any, write_lines: Writer) -> None:
    first = write_lines(*({"prompt": f"a{n}", "responses": ["A", "B"], "rewards": [1, 0]} for n in range(60)), name="a.jsonl")
    second = write_lines(*({"prompt": f"b{n}", "responses": ["A", "B"], "rewards": [1, 0]} for n in range(20)), name="b.jsonl")
    _, whole, _ = run([first, second])
    assert len(whole) == 80
    summary, groups, _ = run([first, second], weights=[1.0, 1.0], output="even")
    files = Counter(group.where.split("/")[-1].split(":")[0] for group in groups)
    assert files == Counter({"a.jsonl": 20, "b.jsonl": 20})
    assert summary.tally.outside_weights == 40
    _, groups, _ = run([first, second], weights=[3.0, 1.0], output="three")
    assert Counter(group.where.split("/")[-1].split(":")[0] for group in groups) == Counter({"a.jsonl": 60, "b.jsonl": 20})


@pytest.mark.parametrize(("scores", "warned"), [((1, 5), True), ((5, 1), False), ((3, 3), False)])
def test_scores_against_the_labels_are_told(run: Any, write_lines: Writer, scores: tuple[int, int], warned: bool) -> None:
    """As of a column in which lower is better: training would prefer what was rejected."""
    row = {"prompt": "Q", "chosen": "A", "rejected": "B", "score_chosen": scores[0], "score_rejected": scores[1]}
    summary, _, printed = run(write_lines(row))
    assert summary.tally.labels_against_rewards == warned
    assert ("WARNING: in 1 groups a chosen response has a lower reward" in printed) == warned


def test_an_input_of_which_nothing_is_left_is_refused(run: Any, write_lines: Writer) -> None:
    """Nobody reads of it in a table after an hour."""
    scored = write_lines({"prompt": "a", "responses": ["A", "B"], "rewards": [1, 0]}, name="scored.jsonl")
    pairs = write_lines({"prompt": "b", "chosen": "A", "rejected": "B"}, name="pairs.jsonl")
    with pytest.raises(DataError, match=r"pairs.jsonl; none of its groups .*do not mix.*pairs.jsonl:1: rewards are missing"):
        run([scored, pairs])
    equal = write_lines({"prompt": "c", "chosen": "A", "rejected": ""}, name="equal.jsonl")
    with pytest.raises(DataError, match=r"equal.jsonl; none of its groups is usable; rejected in all inputs: 1 × rejected"):
        run([equal, pairs])


def test_a_difference_from_apply_chat_template_stops_the_run(
    run: Any, write_lines: Writer, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_lines({"prompt": "Q", "responses": ["A", "B"], "rewards": [1, 0]})
    original = HuggingFaceTokenizer.render_many

    def render(self: HuggingFaceTokenizer, *given: Any, **options: Any) -> list[Any]:
        return [str(text).replace("user", "User") for text in original(self, *given, **options)]

    monkeypatch.setattr(HuggingFaceTokenizer, "render_many", render)
    with pytest.raises(DataError, match=r"rows.jsonl:1: group .*: prompt differs from apply_chat_template: '.*User"):
        run(path)


def test_a_text_of_megabytes_costs_little(run: Any, write_lines: Writer) -> None:
    import resource

    big = "word " * 4_000_000
    row = {"prompt": "Q", "responses": ["A", "B", big], "rewards": [2, 1, 0]}
    path = write_lines(row, {"prompt": big, "responses": ["A", "B"], "rewards": [1, 0]}, row | {"prompt": "R"})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    summary, groups, _ = run(path)
    assert (summary.tally.overlong_dropped, len(groups), dict(summary.tally.rejected)) == (2, 2, {"prompt": 1})
    # A few copies of 20 MB each; tokenizing all of it takes 250 bytes a character.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 600 * 1024
    _, groups, _ = run(path, overlong="truncate", max_response_tokens=50, output="cut")
    assert [len(ids) for ids in groups[0].response_tokens] == [2, 2, 50]


def test_mutated_rows_are_groups_or_rejections() -> None:
    from tools.fuzz_rows import fuzz

    counts, wrong = fuzz(300, seed=5)
    assert not wrong
    assert counts["groups"] > 30

"""Prompt files: valid content of a line, skipped lines and reasons, tokens as in training."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, PrepareConfig, ScoreConfig, SelectConfig
from mpo_megatron.data.chat import Chat
from mpo_megatron.data.prepare import prepare
from mpo_megatron.data.store import load_groups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.files import DataError
from mpo_megatron.rollout.prompts import PromptSet, load_prompts
from mpo_megatron.rollout.score import score
from mpo_megatron.rollout.select import select
from tests.json_lines import write_lines


def load(path: Path, model: Path, *, system: str | None = None, limit: int = 2048, most: int | None = None) -> PromptSet:
    chat = Chat(load_tokenizer(model), system_prompt=system)
    return load_prompts(str(path), chat, max_prompt_tokens=limit, max_prompts=most)


def tokens_by_id(found: PromptSet) -> dict[str, tuple[int, ...]]:
    return dict(zip(found.group_ids, map(tuple, found.token_ids), strict=True))


ROWS: list[dict[str, Any]] = [
    {"id": 7, "prompt": "Name a colour.", "responses": ["Blue.", "Seven."], "rewards": [1.0, 0.0]},
    {
        "group_id": "turns",
        "prompt": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello <|im_end|> there\n"},
            {"role": "assistant", "content": "Hi."},
            {"role": "user", "content": "  Naïve café? 東京 🙂"},
        ],
        "responses": ["No.", "Yes."],
        "rewards": [0.0, 1.0],
    },
]


@pytest.mark.parametrize("system", [None, "Answer in verse."])
def test_tokens_are_those_of_prepare(tmp_path: Path, model_folder: Path, system: str | None) -> None:
    path = write_lines(tmp_path / "rows.jsonl", ROWS)
    config = PrepareConfig(input=str(path), output=str(tmp_path / "out"), tokenizer=str(model_folder), system_prompt=system)
    prepare(config, Console(quiet=True))
    prepared = {group.group_id: tuple(group.prompt_tokens.tolist()) for group in load_groups(tmp_path / "out")}
    assert tokens_by_id(load(path, model_folder, system=system)) == prepared
    from_folder = load(tmp_path / "out", model_folder, system=system)  # a prepared folder as the prompt file
    assert tokens_by_id(from_folder) == prepared
    assert from_folder.records[1]["prompt"] == ROWS[1]["prompt"]


def test_tools_histories_and_json_are_rendered_as_in_prepare(tmp_path: Path, model_folder: Path) -> None:
    tool = {"type": "function", "function": {"name": "get_sky", "parameters": {"type": "object", "properties": {}}}}
    responses = {"responses": ["No.", "Yes."], "rewards": [0.0, 1.0]}
    rows: list[dict[str, Any]] = [
        {"id": 1, "prompt": [{"role": "user", "content": "Sky?"}], "tools": json.dumps([tool])} | responses,
        {"id": 2, "instruction": "Translate:", "input": "Sky", "history": [["Hi", "Hello"]], "system": "Be brief."} | responses,
        {"id": 3, "prompt": json.dumps([{"role": "user", "content": "Sea?"}])} | responses,
        {"id": 4, "input": {"messages": [{"role": "user", "content": "Wind?"}], "tools": [tool]}} | responses,
    ]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ (tools | tojson) if tools else '' }}{% for m in messages %}{{ '<|im_start|>' + m.role + m.content + '<|im_end|>' }}"
        "{% endfor %}{{ '<|im_start|>assistant' if add_generation_prompt else '' }}"
    )
    config = PrepareConfig(
        input=str(path), output=str(tmp_path / "out"), tokenizer=str(model_folder), chat_template=str(template)
    )
    prepare(config, Console(quiet=True))
    prepared = {group.group_id: tuple(group.prompt_tokens.tolist()) for group in load_groups(tmp_path / "out")}
    chat = Chat(load_tokenizer(model_folder, template))
    found = load_prompts(str(path), chat, max_prompt_tokens=2048)
    assert tokens_by_id(found) == prepared
    assert found.records[0]["tools"] == [tool]
    assert [len(record["prompt"]) for record in found.records] == [1, 4, 1, 1]
    assert found.records[3]["tools"] == [tool]
    assert not any("meta" in record for record in found.records)
    assert tokens_by_id(load_prompts(str(tmp_path / "out"), chat, max_prompt_tokens=2048)) == prepared


def test_groups_of_standard_input_are_no_prompts(tmp_path: Path, model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing, or something else, comes from it by then."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(lines)))
    prepare(PrepareConfig(input="-", output=str(tmp_path / "out"), tokenizer=str(model_folder)), Console(quiet=True))
    with pytest.raises(DataError, match="it was prepared from standard input, which is gone; name a file"):
        load(tmp_path / "out", model_folder)


def test_held_out_prompts_stay_apart(tmp_path: Path, model_folder: Path) -> None:
    rows = [ROWS[0] | {"id": index, "prompt": f"Question {index}"} for index in range(20)]
    path = write_lines(tmp_path / "rows.jsonl", rows)
    prepare(
        PrepareConfig(input=str(path), output=str(tmp_path / "out"), tokenizer=str(model_folder), held_out=5), Console(quiet=True)
    )
    train = {record["group_id"] for record in load(tmp_path / "out", model_folder).records}
    held = {record["group_id"] for record in load(tmp_path / "out-eval", model_folder).records}
    assert (len(train), len(held), train & held) == (15, 5, set())
    path.unlink()
    with pytest.raises(DataError, match=r"source file cannot be read.*rows\.jsonl"):
        load(tmp_path / "out", model_folder)


def test_fields_go_along(tmp_path: Path, model_folder: Path) -> None:
    row = {"prompt": "2 + 2?", "reference_answer": [4, "four"], "level": 3, "meta": {"source": "book"}, "note": None}
    [record] = load(write_lines(tmp_path / "p.jsonl", [row]), model_folder).records
    assert (
        record.pop("group_id")
        == load(write_lines(tmp_path / "q.jsonl", [{"prompt": "2 + 2?"}]), model_folder).records[0]["group_id"]
    )
    assert set(record.pop("prompt_digests")) == {"tokenizer", "messages", "ids"}
    assert record == {
        "prompt": [{"role": "user", "content": "2 + 2?"}],
        "reference_answer": [4, "four"],
        "meta": {"level": 3, "source": "book"},
    }


def test_other_formats_give_their_prompts(tmp_path: Path, model_folder: Path) -> None:
    rows = [
        {"chosen": f"\n\nHuman: Q{index}\n\nAssistant: yes", "rejected": f"\n\nHuman: Q{index}\n\nAssistant: no"}
        for index in range(3)
    ]
    found = load(write_lines(tmp_path / "p.jsonl", rows), model_folder)
    assert [record["prompt"] for record in found.records] == [[{"role": "user", "content": f"Q{index}"}] for index in range(3)]


def test_what_is_left_out_is_named(tmp_path: Path, model_folder: Path) -> None:
    path = tmp_path / "p.jsonl"
    rows = [
        {"prompt": "a"},
        {"prompt": "b", "id": "x"},
        {"prompt": "a", "id": "y"},
        {"prompt": "long " * 50},
        {"prompt": " "},
        {"text": 1},
        {"prompt": "e", "images": ["a.png"]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"prompt": "c"\n' + '{"prompt": "d", "x": NaN}\n')
    found = load(path, model_folder, limit=100)
    assert [record["prompt"][0]["content"] for record in found.records] == ["a", "b"]
    assert found.counts == {"prompts": 2, "duplicates": 1, "too_long": 1, "invalid": 5}
    told = {item.line: f"{item.group_id} {item.field} {item.reason}" for item in found.rejections}
    assert told[3] == f"y prompt repeats the prompt of {path}:1"
    assert "tokens, but max_prompt_tokens = 100" in told[4]
    assert [*told] == [3, 4, 5, 6, 7, 8, 9]
    assert "images is not text, and only text is read" in told[7]
    assert "JSON cannot hold" in told[9]


def test_deeply_nested_rows_are_left_out(tmp_path: Path, model_folder: Path) -> None:
    """Python's limit depends on what reads them; no depth is an error of the whole file."""
    tool = '{"type": "function", "function": {"name": "f", "x": DEEP}}'
    deep = (tool.replace("DEEP", "[" * depth + "]" * depth) for depth in range(100, 1600, 25))
    rows = [f'{{"prompt": "Q", "tools": [{tool}]}}' for tool in deep]
    (tmp_path / "deep.jsonl").write_text("\n".join([*rows, '{"prompt": "Sky?"}']))
    found = load(tmp_path / "deep.jsonl", model_folder)
    assert found.records[-1]["prompt"] == [{"role": "user", "content": "Sky?"}]
    assert len(found.records) + len(found.rejections) == len(rows) + 1
    assert "is nested too deeply" in {rejection.reason for rejection in found.rejections}


def test_one_id_for_two_prompts_is_refused(tmp_path: Path, model_folder: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": "a", "id": 1}, {"prompt": "b", "id": 1}])
    with pytest.raises(DataError, match=r"p\.jsonl:2: group_id = 1 already belongs to the prompt at .*p\.jsonl:1"):
        load(path, model_folder)


def test_nothing_usable_is_refused(tmp_path: Path, model_folder: Path) -> None:
    with pytest.raises(DataError, match=r"it holds no usable prompt.*p\.jsonl:1: prompt is empty"):
        load(write_lines(tmp_path / "p.jsonl", [{"prompt": ""}]), model_folder)
    with pytest.raises(DataError, match="no such file"):
        load(tmp_path / "nowhere.jsonl", model_folder)


def test_first_prompts_only(tmp_path: Path, model_folder: Path) -> None:
    path = write_lines(tmp_path / "p.jsonl", [{"prompt": text} for text in ("a", "a", "b", "c")])
    assert [record["prompt"][0]["content"] for record in load(path, model_folder, most=2).records] == ["a", "b"]


@pytest.fixture(scope="module")
def selected(tmp_path_factory: pytest.TempPathFactory, model_folder: Path) -> Path:
    """Groups sampled with a system prompt, that went through `mpo score` and `mpo select`."""
    folder = tmp_path_factory.mktemp("selected")
    prompts = write_lines(folder / "prompts.jsonl", [{"prompt": "2 + 2?", "reference_answer": "four"}])
    answers = [{"text": text, "finish_reason": "stop", "num_tokens": 1, "seed": 1} for text in ("four", "five")]
    [record] = load(prompts, model_folder, system="Be brief.").records
    write_lines(folder / "samples.jsonl", [record | {"responses": answers}])
    options = {"scorers": {"right": {"kind": "regex", "pattern": "four"}}}
    score(ScoreConfig(input=str(folder / "samples.jsonl"), output=str(folder / "scored"), **options), Console(quiet=True))
    select(SelectConfig(input=str(folder / "scored"), output=str(folder / "selected")), Console(quiet=True))
    return folder / "selected" / "groups.jsonl"


TERSE = "{% for m in messages %}<|im_start|>{{ m.role + m.content }}<|im_end|>{% endfor %}<|im_start|>assistant"


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"system_prompt": "Be brief."}, None),
        ({"system_prompt": "Be verbose."}, "system_prompt: .*groups.jsonl:1"),
        ({}, "system_prompt: .*groups.jsonl:1"),
        ({"system_prompt": "Be brief.", "chat_template": TERSE}, "chat_template, chat_template_kwargs or prompt_format: "),
    ],
    ids=["same", "another system prompt", "none", "another template"],
)
def test_training_uses_the_prompt_that_was_sampled_with(
    options: dict[str, Any], refused: str | None, selected: Path, tmp_path: Path, model_folder: Path
) -> None:
    if "chat_template" in options:
        (tmp_path / "terse.jinja").write_text(options["chat_template"])
        options = options | {"chat_template": str(tmp_path / "terse.jinja")}
    config = PrepareConfig(input=str(selected), output=str(tmp_path / "out"), tokenizer=str(model_folder), **options)
    if refused is None:
        statistics = prepare(config, Console(quiet=True)).train.statistics["preparation"]
        assert statistics["sampled_otherwise"] == 0
        assert statistics["unused_columns"] == {}
        return
    with pytest.raises(ConfigError, match=rf"{refused}.*sampled with another prompt"):
        prepare(config, Console(quiet=True))
    console = Console(file=io.StringIO(), width=200)
    allowed = prepare(dataclasses.replace(config, other_prompts="allow"), console)
    assert allowed.train.statistics["preparation"]["sampled_otherwise"] == 1
    assert "1 group were sampled with another prompt" in console.file.getvalue()  # type: ignore[attr-defined]


def test_another_tokenizer_renders_another_prompt(selected: Path, tmp_path: Path, model_folder: Path) -> None:
    """Answers of another model: their prompt had other ids, but the same messages."""
    [line] = [json.loads(text) for text in selected.read_text().splitlines()]
    del line["xxh3"]
    line["prompt_digests"] |= {"tokenizer": "another", "ids": "another"}
    source = write_lines(tmp_path / "groups.jsonl", [line])
    options = {"input": str(source), "tokenizer": str(model_folder)}
    found = prepare(PrepareConfig(**options, output=str(tmp_path / "out"), system_prompt="Be brief."), Console(quiet=True))
    assert found.train.statistics["preparation"]["sampled_otherwise"] == 1
    with pytest.raises(ConfigError, match="system_prompt"):
        prepare(PrepareConfig(**options, output=str(tmp_path / "other")), Console(quiet=True))

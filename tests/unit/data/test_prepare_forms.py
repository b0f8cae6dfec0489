"""`mpo prepare` on rows as people have them: every part arrives in the tokens, or is named in the summary."""

from __future__ import annotations

import io
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpo_megatron.config import ConfigError, PrepareConfig
from mpo_megatron.data.prepare import PrepareSummary, prepare
from mpo_megatron.data.store import StoredGroups, load_groups
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.data.tokenizer_backends import HuggingFaceTokenizer
from mpo_megatron.files import DataError
from tests.unit.data.conftest import Writer, train_bpe
from tests.unit.data.messages import CALL, TOOL, assistant, tool, user
from tests.unit.data.templates import SPECIAL, read_template


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
        "tools": [TOOL | {"strict": None}],
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
    assert summary.tally.unused == Counter({"tools: null entries": 1, "extra": 1})
    assert groups.info.statistics["preparation"]["unused_columns"] == {"extra": 1, "tools: null entries": 1}
    assert "extra: 1 row " in printed
    assert f"⟦{wanted}⟧" in printed
    assert summary.tally.checked == 1


@pytest.mark.parametrize("name", ["thinking", "tool_plan"])
def test_words_of_an_answer_that_the_template_omits(run: Any, write_lines: Writer, name: str) -> None:
    row = {"prompt": "Q", "responses": [{"text": "A", name: "hm", "reward": 2}, "B", "C"], "rewards": [2, 1, 0]}
    summary, groups, _ = run(write_lines(row), template="gemma")
    assert groups[0].num_responses == 2
    wanted = f"responses[0].{name} is omitted by the chat template, and would be lost"
    assert summary.tally.examples["dropped responses"].endswith(wanted)


def test_parts_that_the_template_does_not_write(run: Any, write_lines: Writer) -> None:
    thought = {"prompt": [user("Q")], "responses": [[assistant("A", reasoning_content="hm")], "B", "C"], "rewards": [2, 1, 0]}
    summary, groups, printed = run(write_lines(thought | {"tools": [TOOL]}), template="gemma")
    assert groups[0].num_responses == 2
    assert dict(summary.tally.dropped) == {"responses": 1}
    wanted = "responses[0].reasoning_content is omitted by the chat template, and would be lost"
    assert summary.tally.examples["dropped responses"].endswith(wanted)
    assert "tools: 1 group " in printed
    assert summary.tally.not_written == Counter({"tools": 1})


def test_messages_that_the_template_does_not_write(run: Any, write_lines: Writer) -> None:
    row = {"prompt": [{"role": "developer", "content": "Be brief."}, user("Q")], "chosen": "A", "rejected": "B"}
    summary, _, printed = run(write_lines(row), template="qwen2_5")
    assert summary.tally.not_written == Counter({"prompt[] of role developer": 1})
    assert "prompt[] of role developer: 1 group " in printed


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
    assert "chosen_score and rejected_score: empty; labels are used instead of rewards" in printed
    late = [*empty * 22, pairs[-1]]
    summary, groups, printed = run(write_lines(*(row | {"id": number} for number, row in enumerate(late))), output="late")
    assert groups.info.reward_kind == "scores"
    assert "labels are used" not in printed


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
    assert ("WARNING: in 1 group a chosen response has a lower reward" in printed) == warned


def test_an_input_of_which_nothing_is_left_is_refused(run: Any, write_lines: Writer) -> None:
    """Nobody reads of it in a table after an hour."""
    scored = write_lines({"prompt": "a", "responses": ["A", "B"], "rewards": [1, 0]}, name="scored.jsonl")
    pairs = write_lines({"prompt": "b", "chosen": "A", "rejected": "B"}, name="pairs.jsonl")
    with pytest.raises(DataError, match=r"pairs.jsonl; none of its groups .*do not mix.*pairs.jsonl:1: rewards are missing"):
        run([scored, pairs])
    equal = write_lines({"prompt": "c", "chosen": "A", "rejected": ""}, name="equal.jsonl")
    with pytest.raises(DataError, match=r"equal.jsonl; none of its groups is usable; rejected in all inputs: 1 × rejected"):
        run([equal, pairs])
    again = write_lines({"prompt": "a", "responses": ["A", "B"], "rewards": [1, 0]}, name="again.jsonl")
    with pytest.raises(DataError, match=r"again.jsonl; none of its groups is usable; rejected in all inputs: 1 × id"):
        run([scored, again])


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


@pytest.mark.parametrize("template", ["qwen2_5", "qwen3", "llama3_1"])
def test_a_message_that_spells_out_another_end_token_passes_the_check(
    run: Any, model: Path, write_lines: Writer, template: str
) -> None:
    """As of a base model: its end of text is not the template's end of a turn."""
    ends = ["<|endoftext|>", "<|im_end|>\n"]
    row = {"prompt": "Q", "chosen": [assistant(f"Yes.{ends[0]}")], "rejected": [assistant(f"No.{ends[1]}")]}
    summary, groups, _ = run(write_lines(row), template=template)
    _, answers = shown(model, groups)
    end = "<|eot_id|>" if template == "llama3_1" else "<|im_end|>"
    assert [answer.rpartition("\n")[2] for answer in answers] == [f"Yes.{end}", f"No.{end}"]
    assert summary.tally.checked == 1

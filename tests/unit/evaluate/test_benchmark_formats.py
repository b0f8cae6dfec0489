"""Answers of public benchmarks, in the form that the benchmarks' own readers expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.evaluate.benchmarks import TurnAnswer, count_markdown, read_questions, write_answers
from mpo_megatron.files import DataError
from tests.json_lines import write_lines

TEXT = "# Title\n\n1. one\n2. **two**\n- three\n```\n# no header\n- no item\n```\n"


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_alpaca_eval(tmp_path: Path) -> None:
    source = tmp_path / "alpaca_eval.json"
    items = [{"instruction": f"Say {i}.", "output": "x", "generator": "text_davinci_003", "dataset": "koala"} for i in range(3)]
    source.write_text(json.dumps(items))
    questions = read_questions("alpaca_eval", source)
    path = write_answers(
        "alpaca_eval", tmp_path / "out", "our/model", questions, [[TurnAnswer(text=f"{i}", num_tokens=1)] for i in range(3)]
    )
    # AlpacaEval matches outputs with its references by instruction, and takes name and dataset from these keys.
    assert json.loads(path.read_text()) == [
        {"dataset": "koala", "instruction": f"Say {i}.", "output": f"{i}", "generator": "our/model"} for i in range(3)
    ]


def test_mt_bench_has_both_turns_and_its_temperatures(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "question.jsonl",
        [
            {"question_id": 81, "category": "writing", "turns": ["Write.", "Rewrite."]},
            {"question_id": 111, "category": "math", "turns": ["Add.", "Subtract."], "reference": ["1", "2"]},
        ],
    )
    questions = read_questions("mt_bench", source)
    assert [question.temperature for question in questions] == [0.7, 0.0]
    answers = [[TurnAnswer(text="a", num_tokens=1), TurnAnswer(text="b", num_tokens=1)]] * 2
    path = write_answers("mt_bench", tmp_path / "out", "org/model", questions, answers)
    assert path == tmp_path / "out" / "model_answer" / "org--model.jsonl"
    records = lines(path)
    assert [record["question_id"] for record in records] == [81, 111]
    # FastChat's judge reads these; answer ids distinguish answers.
    assert records[0]["choices"] == [{"index": 0, "turns": ["a", "b"]}]
    assert records[0]["model_id"] == "org/model"
    assert records[0]["tstamp"] > 0
    assert records[0]["answer_id"] != records[1]["answer_id"]


def test_arena_hard_answers_follow_the_schema_of_their_questions(tmp_path: Path) -> None:
    new = write_lines(
        tmp_path / "v2.jsonl", [{"uid": "0a", "category": "hard_prompt", "subcategory": "coding", "prompt": "Sort."}]
    )
    old = write_lines(
        tmp_path / "v01.jsonl",
        [{"question_id": "1f", "category": "arena-hard-v0.1", "cluster": "c", "turns": [{"content": "Sort."}]}],
    )
    answers = [[TurnAnswer(text=TEXT, num_tokens=17)]]
    (record,) = lines(write_answers("arena_hard", tmp_path / "new", "m", read_questions("arena_hard", new), answers))
    assert record["uid"] == "0a"
    assert record["model"] == "m"
    assert record["messages"] == [
        {"role": "user", "content": "Sort."},
        {"role": "assistant", "content": {"answer": TEXT}},
    ]
    assert record["metadata"]["token_len"] == 17
    assert record["metadata"]["header_count"] == {"h1": 1, "h2": 0, "h3": 0, "h4": 0, "h5": 0, "h6": 0}
    assert record["metadata"]["list_count"] == {"ordered": 2, "unordered": 1}
    assert record["metadata"]["bold_count"] == {"**": 1, "__": 0}
    (record,) = lines(write_answers("arena_hard", tmp_path / "old", "m", read_questions("arena_hard", old), answers))
    assert record["question_id"] == "1f"
    assert record["choices"] == [{"index": 0, "turns": [{"content": TEXT, "token_len": 17}]}]


def test_a_line_separator_within_a_question_ends_no_line(tmp_path: Path) -> None:
    source = tmp_path / "question.jsonl"
    source.write_text(json.dumps({"uid": "u", "prompt": "one\u2028two"}, ensure_ascii=False) + "\n", encoding="utf-8")
    (question,) = read_questions("arena_hard", source)
    assert question.turns == ("one\u2028two",)


def test_markdown_in_code_does_not_count() -> None:
    assert count_markdown("```\n# a\n- b\n**c**\n```")["header_count"]["h1"] == 0


@pytest.mark.parametrize(
    ("benchmark", "text", "message"),
    [
        ("mt_bench", '{"question_id": "x1", "category": "math", "turns": ["a"]}', "question 1"),
        ("arena_hard", '{"uid": "1", "prompt": "a"}\n{"category": "b"}', "question 2"),
        ("alpaca_eval", "[]", "no questions"),
        ("mt_bench", "not json", "question 1"),
    ],
)
def test_other_files_are_named(tmp_path: Path, benchmark: Any, text: str, message: str) -> None:
    path = tmp_path / "questions"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        read_questions(benchmark, path)
    with pytest.raises(DataError, match="no such file"):
        read_questions(benchmark, tmp_path / "nowhere")

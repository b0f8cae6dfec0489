"""Questions of AlpacaEval, Arena-Hard and MT-Bench, and answers in the formats of their own judges.

                 questions                      answers
    AlpacaEval   alpaca_eval.json               model_outputs.json, for `alpaca_eval --model_outputs`
    Arena-Hard   data/<bench>/question.jsonl    model_answer/<name>.jsonl, for data/<bench>/model_answer
    MT-Bench     data/mt_bench/question.jsonl   model_answer/<name>.jsonl, for data/mt_bench/model_answer

Arena-Hard's questions come in two schemas, and answers use the schema of their questions: `uid` and `prompt` (v2.0), or
`question_id` and `turns` (v0.1).
Source: the question and answer files that `alpaca_eval`, `lmarena/arena-hard-auto` and FastChat's `llm_judge` read and write.
"""

from __future__ import annotations

import json
import re
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file

Benchmark = Literal["alpaca_eval", "arena_hard", "mt_bench"]

MT_BENCH_TEMPERATURE = {
    "writing": 0.7,
    "roleplay": 0.7,
    "extraction": 0.0,
    "math": 0.0,
    "coding": 0.0,
    "reasoning": 0.0,
    "stem": 0.1,
    "humanities": 0.1,
}
"""Sampling temperature of each category, as in FastChat's `llm_judge`; others 0.7."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """One question of a benchmark."""

    key: str
    """Its id as text, for messages and seeds."""
    turns: tuple[str, ...]
    """The user's messages, turn by turn."""
    temperature: float
    """The benchmark's own sampling temperature (AlpacaEval prescribes none: 0.7)."""
    raw: dict[str, Any]
    """The line of the question file."""


@dataclass(frozen=True, kw_only=True)
class TurnAnswer:
    """The model's answer in one turn."""

    text: str
    num_tokens: int


def read_questions(benchmark: Benchmark, path: Path) -> list[Question]:
    """The questions of a benchmark's own file.

    Raises:
        DataError: no such file, or a line is not a question of this benchmark.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the question file from {benchmark}'s own repository.")
    questions: list[Question] = []
    try:
        text = path.read_text(encoding="utf-8-sig")
        lines = text.split("\n") if benchmark != "alpaca_eval" else [json.dumps(item) for item in json.loads(text)]
        for line in filter(str.strip, lines):
            raw = json.loads(line)
            json.dumps(raw, ensure_ascii=False).encode()  # half of a surrogate pair could not be written
            questions.append(_READERS[benchmark](raw, len(questions)))
    except (KeyError, TypeError, ValueError, IndexError, RecursionError) as error:
        number = len(questions) + 1
        raise DataError(
            f"{path}: question {number}: not a question of {benchmark} ({type(error).__name__}: {error}); copy the file "
            f"again from {benchmark}'s own repository, or correct it."
        ) from error
    if not questions:
        raise DataError(f"{path}: it contains no questions.")
    return questions


def write_answers(
    benchmark: Benchmark, folder: Path, generator: str, questions: Sequence[Question], answers: Sequence[Sequence[TurnAnswer]]
) -> Path:
    """Write one answer per question and turn, where the benchmark's judge expects it; the file's path.

    Args:
        folder: receives `model_outputs.json` or `model_answer/<generator>.jsonl`
        generator: the model's name in the benchmark's tables
    """
    records = [_WRITERS[benchmark](question, turns, generator) for question, turns in zip(questions, answers, strict=True)]
    name = generator.replace("/", "--")
    path = folder / ("model_outputs.json" if benchmark == "alpaca_eval" else f"model_answer/{name}.jsonl")
    if benchmark == "alpaca_eval":
        replace_file(path, [json.dumps(records, indent=2, ensure_ascii=False).encode()])
    else:
        replace_file(path, (json.dumps(record, ensure_ascii=False).encode() + b"\n" for record in records))
    return path


def _read_alpaca_eval(raw: dict[str, Any], number: int) -> Question:
    return Question(key=f"alpaca_eval-{number}", turns=(str(raw["instruction"]),), temperature=0.7, raw=raw)


def _read_arena_hard(raw: dict[str, Any], number: int) -> Question:
    if "uid" in raw:
        return Question(key=str(raw["uid"]), turns=(str(raw["prompt"]),), temperature=0.0, raw=raw)
    turns = tuple(str(turn["content"]) for turn in raw["turns"])
    return Question(key=str(raw["question_id"]), turns=turns, temperature=0.0, raw=raw)


def _read_mt_bench(raw: dict[str, Any], number: int) -> Question:
    int(raw["question_id"])  # FastChat sorts answers by it
    return Question(
        key=str(raw["question_id"]),
        turns=tuple(str(turn) for turn in raw["turns"]),
        temperature=MT_BENCH_TEMPERATURE.get(raw["category"], 0.7),
        raw=raw,
    )


def _write_alpaca_eval(question: Question, answers: Sequence[TurnAnswer], generator: str) -> dict[str, Any]:
    return {
        "dataset": question.raw.get("dataset", "alpaca_eval"),
        "instruction": question.raw["instruction"],
        "output": answers[0].text,
        "generator": generator,
    }


def _write_arena_hard(question: Question, answers: Sequence[TurnAnswer], generator: str) -> dict[str, Any]:
    if "uid" not in question.raw:
        turns = [{"content": answer.text, "token_len": answer.num_tokens} for answer in answers]
        return _choices(question, turns, generator)
    return {
        "uid": question.raw["uid"],
        "ans_id": _answer_id(question, generator),
        "model": generator,
        "messages": [
            {"role": "user", "content": question.raw["prompt"]},
            {"role": "assistant", "content": {"answer": answers[0].text}},
        ],
        "tstamp": time.time(),
        "metadata": {"token_len": answers[0].num_tokens, **count_markdown(answers[0].text)},
    }


def _write_mt_bench(question: Question, answers: Sequence[TurnAnswer], generator: str) -> dict[str, Any]:
    return _choices(question, [answer.text for answer in answers], generator)


def _choices(question: Question, turns: list[Any], generator: str) -> dict[str, Any]:
    """FastChat's record of an answer, also used by Arena-Hard v0.1."""
    return {
        "question_id": question.raw["question_id"],
        "answer_id": _answer_id(question, generator),
        "model_id": generator,
        "choices": [{"index": 0, "turns": turns}],
        "tstamp": time.time(),
    }


def _answer_id(question: Question, generator: str) -> str:
    return uuid.uuid5(uuid.NAMESPACE_OID, f"{generator}\n{question.key}").hex


def count_markdown(text: str) -> dict[str, dict[str, int]]:
    """Headers, list items and bold runs outside code blocks, as counted by Arena-Hard's style control."""
    prose = re.sub(r"```[^`]*```", "", text)

    def count(pattern: str) -> int:
        return len(re.findall(pattern, prose, re.MULTILINE))

    return {
        "header_count": {f"h{level}": count(rf"^#{{{level}}}\s") for level in range(1, 7)},
        "list_count": {"ordered": count(r"^\s*\d+\.\s"), "unordered": count(r"^\s*[-*+]\s")},
        "bold_count": {"**": count(r"\*\*[^*\n]+\*\*"), "__": count(r"__[^_\n]+__")},
    }


_READERS: dict[str, Callable[[dict[str, Any], int], Question]] = {
    "alpaca_eval": _read_alpaca_eval,
    "arena_hard": _read_arena_hard,
    "mt_bench": _read_mt_bench,
}
_WRITERS: dict[str, Callable[[Question, Sequence[TurnAnswer], str], dict[str, Any]]] = {
    "alpaca_eval": _write_alpaca_eval,
    "arena_hard": _write_arena_hard,
    "mt_bench": _write_mt_bench,
}

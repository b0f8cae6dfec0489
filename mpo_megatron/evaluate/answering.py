"""A candidate's answers to a benchmark's questions: from its samples, or asked of the model, turn after turn.

Each turn, and each sampling temperature in it, is one `mpo generate`, so that everything about templates, engines and resuming is
the same, and a second turn sees the first's answer.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mpo_megatron.config import EvaluateConfig, GenerateConfig, from_dict
from mpo_megatron.data.group import Message
from mpo_megatron.evaluate.benchmarks import Benchmark, Question, TurnAnswer
from mpo_megatron.evaluate.samples import is_model, prompt_key, read_texts
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.rollout.generate import generate
from mpo_megatron.rollout.records import (
    GENERATE_FILE,
    SAMPLES_FILE,
    SCORE_FILE,
    SCORED_FILE,
    Record,
    encode_line,
    find_lines,
)
from mpo_megatron.rollout.stages import run_command


def answer_questions(config: EvaluateConfig, benchmark: Benchmark, questions: Sequence[Question]) -> list[list[TurnAnswer]]:
    """One answer per question and turn.

    Raises:
        DataError: a question has no answer.
    """
    assert config.candidate is not None
    answers: list[list[TurnAnswer]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        asked = [index for index, question in enumerate(questions) if turn < len(question.turns)]
        prompts = {index: conversation(questions[index], answers[index]) for index in asked}
        if is_model(config.candidate):
            texts: dict[str, Record] = {}
            for temperature in sorted({questions[index].temperature for index in asked}):
                batch = [index for index in asked if questions[index].temperature == temperature]
                records = [{"group_id": questions[index].key, "prompt": prompts[index]} for index in batch]
                texts |= ask(config, benchmark, f"turn-{turn + 1}-temperature-{temperature:g}", temperature, records)
        else:
            texts = dict(read_texts(find_answers(config.candidate)))
        for index in asked:
            found = texts.get(prompt_key({"prompt": prompts[index]}))
            if found is None:
                raise DataError(_missing(config, benchmark, questions[index], turn))
            answers[index].append(TurnAnswer(text=found["text"], num_tokens=found.get("num_tokens", 0)))
    return answers


def conversation(question: Question, answers: Sequence[TurnAnswer]) -> list[Message]:
    """The messages up to the turn that follows the given answers."""
    messages: list[Message] = []
    for text, answer in zip(question.turns, answers, strict=False):
        messages += [{"role": "user", "content": text}, {"role": "assistant", "content": answer.text}]
    return [*messages, {"role": "user", "content": question.turns[len(answers)]}]


def ask(
    config: EvaluateConfig, benchmark: Benchmark, name: str, temperature: float, records: list[dict[str, Any]]
) -> dict[str, Record]:
    """The model's answers to these prompts, by prompt."""
    folder = Path(config.output) / benchmark / name
    prompts = folder.with_name(f"{name}.jsonl")
    replace_file(prompts, map(encode_line, records))
    options = {
        **config.generate,
        "prompts": str(prompts),
        "model": config.candidate,
        "output": str(folder),
        "num_responses": 1,
        "temperature": temperature,
        "shard": "0/1",  # whole, even in a task of a Slurm array
        "empty": "keep",  # an empty answer is an answer: the judge sees it
        "duplicates": "keep",
    }
    run_command("generate", generate, from_dict(GenerateConfig, options, "generate"))
    return dict(read_texts(find_lines(folder, SAMPLES_FILE, GENERATE_FILE)))


def find_answers(candidate: str) -> Path:
    """The file of samples that a candidate which is no model means."""
    if (Path(candidate) / SCORED_FILE).is_file():
        return find_lines(candidate, SCORED_FILE, SCORE_FILE)
    return find_lines(candidate, SAMPLES_FILE, GENERATE_FILE)


def _missing(config: EvaluateConfig, benchmark: Benchmark, question: Question, turn: int) -> str:
    where = f"{benchmark}: question {question.key} has no answer"
    if turn > 0:
        return f"{where} to turn {turn + 1}, which depends on the answers before; give a model as candidate."
    if is_model(str(config.candidate)):
        return (
            f"{where}; its prompt was left out ({config.output}/{benchmark}/*/rejected.jsonl): raise generate.max_prompt_tokens."
        )
    return f"{where} in {config.candidate}; sample from the benchmark's questions ({json.dumps(question.turns[0])[:60]} …)."

"""The split of prompts into rounds and held-out ones."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError
from mpo_megatron.files import DataError
from mpo_megatron.rollout.prompt_split import split_prompts
from tests.unit.rollout.conftest import write_prompt_file


def questions(rows: Iterable[dict[str, Any]]) -> set[str]:
    return {row["prompt"] for row in rows}


def test_every_prompt_has_one_place_whatever_the_order(tmp_path: Path) -> None:
    split = split_prompts(write_prompt_file(tmp_path / "a.jsonl", 23), rounds=3, held_out=5, seed=0)
    other = split_prompts(write_prompt_file(tmp_path / "b.jsonl", 23, order=-1), rounds=3, held_out=5, seed=0)
    parts = [*split.rounds, split.held_out]
    assert [len(part) for part in parts] == [6, 6, 6, 5]
    assert len(set().union(*map(questions, parts))) == 23
    assert [questions(part) for part in parts] == [questions(part) for part in [*other.rounds, other.held_out]]
    assert all(row["answer"] == int(row["prompt"].split()[1][:-1]) for part in parts for row in part)
    shuffled = split_prompts(tmp_path / "a.jsonl", rounds=3, held_out=5, seed=1)
    assert questions(shuffled.held_out) != questions(split.held_out)
    # The held-out prompts do not depend on the number of rounds.
    assert questions(split_prompts(tmp_path / "a.jsonl", rounds=2, held_out=5, seed=0).held_out) == questions(split.held_out)


def test_memory_does_not_grow_with_the_prompts_texts(tmp_path: Path) -> None:
    path = tmp_path / "long.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{number} {'x' * 200_000}"}) + "\n" for number in range(250)))  # 50 MB
    tracemalloc.start()
    split = split_prompts(path, rounds=2, held_out=50, seed=0)
    read = sum(len(row["prompt"]) for part in (*split.rounds, split.held_out) for row in part)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert read > 50e6
    assert peak < 20e6  # 8 MiB until they move to a file, and copies of some prompts


def test_duplicates_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_prompt_file(tmp_path / "a.jsonl", 6)
    path.write_text(path.read_text() * 2 + '{"prompt": [{"role": "user", "content": "Question 0?"}]}\n')
    split = split_prompts(path, rounds=1, held_out=2, seed=0)
    assert split.num_duplicates == 7
    assert len(split.rounds[0]) == 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"prompt": "a"}\n{"question": ""}\n', r"p\.jsonl:2: question is empty"),
        ('{"prompt": "a"}\n["b"]\n', r"p\.jsonl:2: row is of type list"),
        ('{"prompt": "a"}\n{"prom', r"p\.jsonl:2: is not valid JSON"),
        ('{"prompt": "a"}\n{"prompt": "b", "id": ""}\n', r"p\.jsonl:2: id is ''; use a non-empty string"),
        ('{"prompt": "a", "id": 1}\n{"prompt": "b", "id": 1}\n{"prompt": "c"}\n', "the id 1 belongs to two different prompts"),
    ],
)
def test_bad_prompts_are_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "p.jsonl").write_text(text)
    with pytest.raises(DataError, match=message):
        split_prompts(tmp_path / "p.jsonl", rounds=1, held_out=2, seed=0)


def test_too_few_prompts(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="holds 5 different prompts; rounds = 3 and held_out = 4 need at least 7"):
        split_prompts(write_prompt_file(tmp_path / "p.jsonl", 5), rounds=3, held_out=4, seed=0)

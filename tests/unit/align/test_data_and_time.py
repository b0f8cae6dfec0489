"""What `mpo align` reads of its data beforehand, and how long it expects the work to take."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.align.estimate import Machine, generation_rate, groups_of_round
from mpo_megatron.align.plan import count_rows, data_digest
from mpo_megatron.config import (
    DataConfig,
    GenerateConfig,
    IterateConfig,
    ModelConfig,
    PlanConfig,
    PrepareConfig,
    TrainConfig,
)
from mpo_megatron.plan.plan import build_problem


def test_rounds_of_one_run_share_its_steps() -> None:
    data = DataConfig(train="d", groups_per_step=8)
    train = TrainConfig(output="o", model=ModelConfig(checkpoint="m"), data=data, max_steps=30)
    fresh = IterateConfig(output="o", model="m", prompts="p", rounds=3)
    continued = dataclasses.replace(fresh, optimizer="continued", reference="initial")
    assert [groups_of_round(config, train, 100) for config in (fresh, continued)] == [240, 80]
    assert groups_of_round(continued, dataclasses.replace(train, max_steps=None, epochs=2), 100) == 200


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
def test_generation_reads_weights_or_multiplies(engine: Any) -> None:
    """On an H100, a decoding step of an 8B model reads 16 GB regardless of the batch."""
    lengths = {"prompt_tokens": 32, "response_tokens": 32, "responses": 4, "groups": 8}
    train = TrainConfig(output="o", model=ModelConfig(checkpoint="m"), data=DataConfig(train="d"))
    workload = build_problem(PlanConfig(gpus=8, model="Llama-3-8B", hardware="h100", **lengths), train)
    generate = GenerateConfig(prompts="p", model="m", output="o", engine=engine)
    rate = generation_rate(Machine(workload=workload, words="", gpu=True), generate)
    reading = 2 * 8.03e9 / (3.35e12 * workload.assumed.memory_efficiency)
    assert rate == pytest.approx((256 if engine == "vllm" else 32) / reading, rel=1e-3)


def test_only_the_rows_that_prepare_reads_count(tmp_path: Path) -> None:
    for name in ("a.jsonl", "b.csv"):  # only reading tells a CSV file's rows
        (tmp_path / name).write_text("p\n" * 5)
    prepare = PrepareConfig(input="", output="", tokenizer="", max_rows=3)
    assert count_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")], "data", prepare) == 6
    assert count_rows([str(tmp_path / "a.jsonl"), str(tmp_path / "b.csv")], "data") == 9


@pytest.mark.parametrize("name", ["data/part.jsonl", "data", "data/*.jsonl"])
def test_a_change_of_the_data_is_seen(tmp_path: Path, name: str) -> None:
    """Also a change that keeps every size; a moved folder is the same."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "part.jsonl").write_text('{"label": 0}')
    before = data_digest([str(tmp_path / name)])
    shutil.copytree(folder, tmp_path / "moved" / "data")
    assert data_digest([str(tmp_path / "moved" / name)]) == before
    (folder / "part.jsonl").write_text('{"label": 1}')
    assert data_digest([str(tmp_path / name)]) != before

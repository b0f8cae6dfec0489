"""Planned rows equal the trainer's rows."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import numpy as np
import pytest

from mpo_megatron.config import LossConfig
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.data.packing import PromptLayout
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.plan.rows import Sequences, count_row, draw_lengths, read_lengths
from mpo_megatron.train.objective import build_objective
from tests.tiny import random_groups, save_groups, save_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = tmp_path_factory.mktemp("model")
    save_tokenizer(model)
    path = tmp_path_factory.mktemp("data") / "groups"
    save_groups(path, random_groups(24, seed=3), model)
    return path


@pytest.mark.parametrize("layout", ["shared", "unshared"])
@pytest.mark.parametrize(("name", "params"), [("mpo", {}), ("mpo", {"partition": "top_bottom"}), ("dpo", {})])
def test_planned_rows_have_the_counts_of_built_ones(
    folder: Path, layout: PromptLayout, name: str, params: dict[str, str]
) -> None:
    objective = build_objective(LossConfig(name=name, params=params))
    sequences = read_lengths(str(folder), objective.select, groups_per_step=24)
    packed = sequences.pack(row_tokens=160, replicas=2, multiple=16, rows_multiple=2, layout=layout, pair_weight=0.01)
    groups = random_groups(24, seed=3)
    for replica in range(2):
        shape = RowShape(
            row_tokens=160, layout=layout, multiple=16, num_replicas=2, replica=replica, pair_weight=0.01, rows_multiple=2
        )
        batch = build_step(0, cast(PreparedGroups, groups), np.arange(24), objective.select, shape)
        assert tuple(count_row(row) for row in batch.rows) == packed.rows[0][replica]
        assert packed.sums[0][replica].scored == int(sum(len(row.targets) for row in batch.rows))
    assert packed.split_groups == len(batch.plan.split_groups)


def test_a_full_row_is_no_smaller_than_any_row(folder: Path) -> None:
    sequences = read_lengths(str(folder), build_objective(LossConfig()).select, groups_per_step=8)
    packed = sequences.pack(row_tokens=200, replicas=1, multiple=16, rows_multiple=1, layout="shared", pair_weight=0.0)
    full = packed.full_row(200)
    assert full.tokens == 208
    for step in packed.rows:
        for row in step[0]:
            assert all(
                getattr(full, name) >= getattr(row, name) for name in ("tokens", "pairs", "scored", "context", "responses")
            )


def test_drawn_lengths_have_the_mean_and_the_spread_asked_for() -> None:
    drawn: Sequences = draw_lengths(
        prompt=300,
        response=200,
        responses=5,
        spread=0.25,
        select=build_objective(LossConfig()).select,
        groups_per_step=64,
        num_groups=1000,
    )
    prompts = np.concatenate([table.prompt_lengths for table, _ in drawn.steps])
    lengths = np.concatenate([table.lengths.ravel() for table, _ in drawn.steps])
    assert abs(prompts.mean() - 300) < 20
    assert abs(lengths.mean() - 200) < 5
    assert prompts.min() >= 225
    assert prompts.max() <= 375
    assert drawn.longest <= 375 + 250

"""Data from which a loss cannot learn are refused before a run begins, not skipped step by step."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_megatron.config import ConfigError, LossConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.train import objective as objectives
from mpo_megatron.train.objective import build_objective, check_contrast
from tests.tiny import save_groups, save_tokenizer

TOKENS = np.arange(3, dtype=np.int32)


def store(folder: Path, *rewards: list[float]) -> PreparedGroups:
    save_tokenizer(folder / "tokenizer")
    groups = [
        TokenizedGroup(group_id=f"g{index}", prompt_tokens=TOKENS, response_tokens=(TOKENS,) * len(own), rewards=np.array(own))
        for index, own in enumerate(rewards)
    ]
    return save_groups(folder / "groups", groups, folder / "tokenizer")


def check(data: PreparedGroups, name: str = "mpo", **params: Any) -> None:
    check_contrast(build_objective(LossConfig(name=name, params=params)), data, "data.train")


def test_groups_without_any_contrast_are_refused(tmp_path: Path) -> None:
    data = store(tmp_path, [1.0, 1.0], [0.5, 0.5, 0.5])
    with pytest.raises(ConfigError, match=r"data.train = .*groups: for loss.name = mpo with .* none of its 2 groups has"):
        check(data)
    check(data, "sft")  # which needs none


def test_sets_larger_than_the_groups_are_refused(tmp_path: Path) -> None:
    data = store(tmp_path, [1.0, 0.0, 0.5], [2.0, 1.0])
    check(data)
    with pytest.raises(ConfigError, match="partition='top_bottom', num_top=9"):
        check(data, partition="top_bottom", num_top=9)


def test_one_group_with_a_contrast_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(objectives, "CHECKED_GROUPS", 2)
    check(store(tmp_path, *[[1.0] * size for size in (2, 3, 4, 2)], [0.0, 0.0, 1.0]))

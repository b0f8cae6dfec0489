"""The warning that weights of rewards leave groups without a gradient."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_megatron.config import LossConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.train.dead_gradients import dead_share, warn_dead_gradients
from mpo_megatron.train.objective import build_objective
from tests.tiny import save_groups, save_tokenizer

TOKENS = np.arange(3, dtype=np.int32)


def groups(*rewards: list[float]) -> list[TokenizedGroup]:
    return [
        TokenizedGroup(group_id=f"g{index}", prompt_tokens=TOKENS, response_tokens=(TOKENS,) * len(own), rewards=np.array(own))
        for index, own in enumerate(rewards)
    ]


def objective(name: str, **params: Any) -> Any:
    return build_objective(LossConfig(name=name, params=params))


@pytest.mark.parametrize(
    ("params", "share"),
    [
        ({"deviation": "signed"}, 0.5),  # a difference of 2: e^20 to 1; of 0.2: e^2 to 1
        ({"deviation": "signed", "alpha": 0.1}, 0.0),
        ({}, 0.0),  # absolute: both responses are as far from the mean
    ],
)
def test_signed_weights_decide_the_loss_before_the_policy_does(params: dict[str, Any], share: float) -> None:
    assert dead_share(objective("wmpo", **params), groups([1.0, -1.0], [0.1, -0.1])) == share


def test_groups_without_contrast_do_not_count() -> None:
    assert dead_share(objective("wmpo", deviation="signed"), groups([1.0, -1.0], [1.0, 1.0])) == 1.0
    assert dead_share(objective("wmpo", deviation="signed"), groups([1.0, 1.0])) == 0.0


def test_one_outlier_above_the_others_is_dead_under_absolute_weights_too() -> None:
    assert dead_share(objective("swepo", alpha=10.0), groups([4.0, 0.0, 0.0, 0.0])) == 1.0


def test_the_warning_names_the_option_and_the_fix(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("groups")
    save_tokenizer(folder / "tokenizer")
    data = save_groups(folder / "groups", groups([1.0, -1.0], [0.1, -0.1]), folder / "tokenizer")
    warning = warn_dead_gradients(objective("wmpo", deviation="signed"), data)
    assert warning is not None
    assert "loss.params.alpha = 10 leaves 50% of 2 sampled groups" in warning
    assert "deviation = absolute" in warning
    assert warn_dead_gradients(objective("wmpo"), data) is None
    assert warn_dead_gradients(objective("mpo"), data) is None


@pytest.mark.parametrize(
    ("params", "fix"),
    [({"alpha": 10.0}, "Lower loss.params.alpha"), ({"weighting": "listing", "alpha": 0.1}, "Raise loss.params.alpha")],
)
def test_the_fix_follows_from_what_alpha_does(params: dict[str, Any], fix: str, tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    data = save_groups(tmp_path / "groups", groups([4.0, 0.0, 0.0, 0.0]), tmp_path / "tokenizer")
    assert fix in str(warn_dead_gradients(objective("swepo", **params), data))

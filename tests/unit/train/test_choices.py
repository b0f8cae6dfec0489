"""The reference's choices on disk: each group's own, found in any order, never used when damaged."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from mpo_megatron.config import ConfigError, ExpertsConfig, validate_experts
from mpo_megatron.data.loader import group_table
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.families.family import Experts
from mpo_megatron.files import DataError
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.train.choices import ReferenceChoices, data_tokens, token_bytes
from mpo_megatron.train.routing import group_tokens
from tests.tiny import random_groups, save_groups, save_tokenizer

SMALL = Experts(num=8, per_token=2, channels=4, layers=(True, False, True))
MANY = Experts(num=300, per_token=3, channels=4, layers=(True,))


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> PreparedGroups:
    folder = tmp_path_factory.mktemp("choices")
    save_tokenizer(folder / "model")
    groups = [*random_groups(7, seed=1), *random_groups(2, seed=2, prompt_tokens=(0, 0), response_tokens=(1, 2))]
    return save_groups(folder / "groups", groups, folder / "model")


def fill(choices: ReferenceChoices) -> list[np.ndarray]:
    """Random choices of all groups, in two parts."""
    rng = np.random.default_rng(0)
    shape = (sum(choices.experts.layers), choices.experts.per_token)
    each = [rng.integers(0, choices.experts.num, (number, *shape)) for number in choices.tokens]
    for indices in (np.array([4, 0, 8]), np.array([1, 2, 3, 5, 6, 7])):
        choices.write(indices, np.concatenate([each[index] for index in indices]))
    return each


@pytest.mark.parametrize("experts", [SMALL, MANY])
def test_each_group_has_its_own_again(data: PreparedGroups, ranks: Ranks, tmp_path: Path, experts: Experts) -> None:
    first = ReferenceChoices.open(tmp_path, data, experts, ranks)
    assert len(first.missing()) == len(data)
    each = fill(first)
    again = ReferenceChoices.open(tmp_path, data, experts, ranks)
    assert len(again.missing()) == 0
    indices = np.array([8, 3, 4])
    table = group_table([data[int(index)] for index in indices], indices)
    assert group_tokens(table).tolist() == data_tokens(data)[indices].tolist()
    found = again.select(table, ranks)
    assert torch.equal(found.ids.long(), torch.from_numpy(np.concatenate([each[index] for index in indices])))
    assert found.starts.tolist() == [0, len(each[8]), len(each[8]) + len(each[3])]
    written = sum(path.stat().st_size for path in tmp_path.glob("*.choices"))
    assert written == int(data_tokens(data).sum()) * token_bytes(experts)
    assert token_bytes(experts) == {8: 4, 300: 6}[experts.num]


def test_damage_is_noticed(data: PreparedGroups, ranks: Ranks, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(ReferenceChoices.open(tmp_path, data, SMALL, ranks))
    first, second = sorted(tmp_path.glob("*.choices"), key=lambda path: path.name)
    content = bytearray(second.read_bytes())
    content[3] ^= 1
    second.write_bytes(content)
    choices = ReferenceChoices.open(tmp_path, data, SMALL, ranks)
    assert len(choices.missing()) == 0  # 70 GB are not read at a start; a group is compared when it is read
    owner = int(next(index for index, (file, start, _) in choices.where.items() if file == second and start == 0))
    with pytest.raises(DataError, match=rf"{second.name}: damaged: the choices of group {owner} .* remove the file"):
        choices.select(group_table([data[owner]], np.array([owner])), ranks)
    second.unlink()
    first.write_bytes(first.read_bytes()[:-1])
    assert len(ReferenceChoices.open(tmp_path, data, SMALL, ranks).missing()) == len(data)
    said = capsys.readouterr().out
    assert "missing, but its list says" in said
    assert said.count("Its groups are computed again when needed.") == 2


def test_a_disk_without_room_is_refused(
    data: PreparedGroups, ranks: Ranks, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choices = ReferenceChoices.open(tmp_path, data, SMALL, ranks)
    needed = int(choices.tokens.sum()) * token_bytes(SMALL)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": needed})())
    choices.require_room(choices.missing())
    monkeypatch.setattr("shutil.disk_usage", lambda folder: type("Usage", (), {"free": needed - 1})())
    with pytest.raises(ConfigError, match=r"expert choices take .* free some space, or set experts.routing to free"):
        choices.require_room(choices.missing())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"balance_coeff": 0.01}, r"experts.balance_coeff = 0.01, but the model of model.checkpoint has no experts"),
        ({"z_coeff": 0.01}, r"experts.z_coeff = 0.01, but"),
        ({"routing": "replay"}, r"experts.routing = replay, but"),
        ({"measure_drift": True}, r"experts.measure_drift = true, but"),
    ],
)
def test_dense_models_refuse_every_option(options: dict[str, object], message: str) -> None:
    config = ExpertsConfig(**options)  # type: ignore[arg-type]
    validate_experts(config, num_experts=4, loss_step="auto")
    with pytest.raises(ConfigError, match=message):
        validate_experts(config, num_experts=0, loss_step="auto")


def test_contradictions_are_refused() -> None:
    for options, message in (
        ({"balance_coeff": -1.0}, "balance_coeff = -1.0; it must be 0"),
        ({"balance_over": "step"}, "without the load-balancing loss"),
        ({"routing": "replay", "measure_drift": True}, "which always measures it"),
    ):
        with pytest.raises(ConfigError, match=message):
            ExpertsConfig(**options)  # type: ignore[arg-type]
    step = ExpertsConfig(balance_coeff=0.1, balance_over="step")
    validate_experts(step, num_experts=4, loss_step="two_phase")
    with pytest.raises(ConfigError, match=r"balance_over = step with loss.step = fused"):
        validate_experts(step, num_experts=4, loss_step="fused")

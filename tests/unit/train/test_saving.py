"""Saves that cannot be planned; tests/distributed/test_faults.py has those that fail later, on two ranks."""

from __future__ import annotations

import resource
import shutil
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import CheckpointConfig, ConfigError, ConvertConfig, DataConfig, ModelConfig, TrainConfig
from mpo_megatron.model.convert import convert
from mpo_megatron.train import loop, saving
from mpo_megatron.train.step_folders import SaveError, check_files, complete_steps, require_space
from tests.tiny import random_groups, save_groups, save_model


def test_a_disk_that_is_full_already_when_a_save_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch, which opens Megatron's common.pt itself, then says "iostream error", and nothing of a file or a disk."""
    convert(ConvertConfig(input=str(save_model(tmp_path / "hf", num_hidden_layers=1)), output=str(tmp_path / "model")))
    save_groups(tmp_path / "train", random_groups(8, seed=1), tmp_path / "hf")
    config = TrainConfig(
        output=str(tmp_path / "run"),
        model=ModelConfig(checkpoint=str(tmp_path / "model"), precision="fp32"),
        data=DataConfig(train=str(tmp_path / "train"), groups_per_step=4, row_tokens=256),
        checkpoint=CheckpointConfig(every=1),
        max_steps=3,
    )
    original, saves = saving.prepare_save, []

    def prepare_save(folder: Path, *arguments: Any) -> Any:
        saves.append(folder)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if len(saves) == 2:
            resource.setrlimit(resource.RLIMIT_FSIZE, (64, limits[1]))
        try:
            return original(folder, *arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(saving, "prepare_save", prepare_save)
    with pytest.raises(SaveError, match=r"step_00000002\.partial-.*: this checkpoint could not be written .*Free some space"):
        loop.train(config)
    [step] = complete_steps(tmp_path / "run")
    assert step.name == "step_00000001"
    check_files(step)
    assert [path.name for path in step.parent.iterdir()] == [step.name]
    monkeypatch.undo()
    assert loop.train(config) is None


def test_room_is_looked_for_where_checkpoints_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run's `checkpoints` may be a link to a larger disk."""
    inside, outside = tmp_path / "run", tmp_path / "large"
    inside.mkdir()
    outside.mkdir()
    (inside / "checkpoints").symlink_to(outside)
    usage = shutil.disk_usage(tmp_path)

    def disk_usage(path: Path) -> Any:
        return usage._replace(free=10**12 if path.resolve() == outside.resolve() else 0)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    require_space(inside / "checkpoints", 10**9, "a checkpoint")
    with pytest.raises(ConfigError, match="are free"):
        require_space(inside, 10**9, "a checkpoint")

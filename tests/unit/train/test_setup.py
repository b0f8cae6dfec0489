"""A run is checked, and what it leaves open is decided, once a process: on the command line, and on each rank."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.cli import main
from mpo_megatron.config import ConvertConfig, TrainConfig, load_yaml, parse
from mpo_megatron.hf import layout
from mpo_megatron.losses import registry
from mpo_megatron.model import architecture
from mpo_megatron.model.convert import convert
from mpo_megatron.train import inputs, launcher, loop, setup
from tests.guide import guide_loss
from tests.tiny import random_groups, save_groups, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model (model) and groups (groups)."""
    folder = tmp_path_factory.mktemp("setup")
    save_model(folder / "hf", num_hidden_layers=2, hidden_size=32)
    convert(ConvertConfig(input=str(folder / "hf"), output=str(folder / "model")))
    save_groups(folder / "groups", random_groups(4, seed=5), folder / "hf")
    return folder


def options(folder: Path, output: Path) -> list[str]:
    return [
        *("--output", str(output), "--model.checkpoint", str(folder / "model"), "--data.train", str(folder / "groups")),
        *("--data.groups_per_step", "4", "--data.row_tokens", "256", "--model.precision", "fp32", "--max_steps", "1"),
    ]


def test_every_check_runs_once_on_the_command_line_and_once_on_a_rank(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        original = getattr(module, name)

        def counted(*arguments: Any, **named: Any) -> Any:
            calls[name] += 1
            return original(*arguments, **named)

        monkeypatch.setattr(module, name, counted)

    for module, name in (
        (layout, "validate_layout"),
        (setup, "validate_folders"),
        (setup, "check_ranks"),
        (inputs, "resolve_model"),
        (architecture, "choose_attention"),
    ):
        count(module, name)
    on_command_line: Counter[str] = Counter()

    def be_the_rank(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
        assert (module, num_ranks) == ("mpo_megatron.train", 1)
        on_command_line.update(calls)
        calls.clear()
        loop.train(setup.build_setup(parse(TrainConfig, arguments, "mpo train"), num_ranks))
        return 0

    monkeypatch.setattr(launcher, "launch", be_the_rank)
    assert main(["train", "--nproc", "1", *options(folder, tmp_path / "run")]) == 0
    once = dict.fromkeys(("validate_layout", "validate_folders", "check_ranks", "resolve_model", "choose_attention"), 1)
    assert on_command_line == once
    del once["choose_attention"]  # building the model reads what was decided, and checks that it is there
    assert {name: calls[name] for name in once} == once
    saved = load_yaml(TrainConfig, tmp_path / "run" / "config.yaml")
    assert (saved.model.backend, saved.model.attention, saved.optimizer.overlap) == ("auto", "auto", "auto")


def train_here(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
    """In the place of `launcher.launch`: one rank, which is this process."""
    loop.train(setup.build_setup(parse(TrainConfig, arguments, "mpo train"), num_ranks))
    return 0


def test_a_run_with_a_loss_of_the_users_resumes_with_the_same_file_only(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(launcher, "launch", train_here)
    monkeypatch.setattr(registry, "_LOSSES", dict(registry._LOSSES))
    monkeypatch.chdir(tmp_path)
    file = Path(guide_loss(tmp_path).rpartition(":")[0])
    command = ["train", "--nproc", "1", *options(folder, tmp_path / "run"), "--loss.function", f"{file.name}:hinge"]
    assert main([*command, "--stop_after", "1", "--max_steps", "2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    # At the start, policy and reference are one, and every pair costs the margin.
    assert [line["loss"] for line in lines if "grad_norm" in line] == pytest.approx([1.0])
    saved = load_yaml(TrainConfig, tmp_path / "run" / "config.yaml")
    assert saved.loss.function == f"{file}:hinge"  # whatever the working directory
    before = file.read_text()
    file.write_text(before.replace("margin - margins", "margin - 2 * margins"))
    capsys.readouterr()
    assert main([*command, "--max_steps", "2"]) == 2
    assert "it was trained with loss.digest of my_losses.py = " in capsys.readouterr().err
    file.write_text(before)
    assert main([*command, "--max_steps", "2"]) == 0


def test_nothing_is_left_open(folder: Path, tmp_path: Path) -> None:
    given = parse(TrainConfig, [*options(folder, tmp_path), "--parallel.tensor", "2"], "mpo train")
    found = setup.build_setup(given, 2)
    assert found.given == given
    model, parallel = found.config.model, found.config.parallel
    assert model.backend in ("local", "transformer_engine")
    assert model.attention in ("sdpa", "flex", "varlen")
    assert parallel.sequence is True
    assert found.config.optimizer.overlap == "none"  # the two ranks share one replica
    assert inputs.resolve(found.config, 2, found.family) == found.config
    again = setup.build_setup(given, 2)
    same = ("config", "family", "model_digest", "reference_digest", "total_steps", "padded_vocab_size", "num_ranks")
    assert all(getattr(again, name) == getattr(found, name) for name in same)
    with pytest.raises(dataclasses.FrozenInstanceError):
        found.total_steps = 3  # type: ignore[misc]

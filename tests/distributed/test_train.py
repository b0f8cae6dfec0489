"""The training command, end to end: it starts at the reference, learns, is killed, resumes, and refuses invalid options."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from mpo_megatron.cli import main
from mpo_megatron.config import ConvertConfig
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.data.store_writing import write_groups
from mpo_megatron.model.convert import convert
from tests.distributed.launch import kill_ranks_when, run_ranks
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed

STEPS = 6


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (model), training groups (train) and held-out groups (eval)."""
    folder = tmp_path_factory.mktemp("train")
    convert(ConvertConfig(input=str(save_model(folder / "hf")), output=str(folder / "model")))
    save_groups(folder / "train", random_groups(24, seed=1), folder / "hf")
    save_groups(folder / "eval", random_groups(6, seed=2), folder / "hf")
    return folder


def options(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--output", str(output), "--model.checkpoint", str(inputs / "model")),
        *("--data.train", str(inputs / "train"), "--data.eval", str(inputs / "eval")),
        *("--data.groups_per_step", "8", "--data.row_tokens", "256", "--epochs", "2", "--eval_every", "3"),
        *("--optimizer.lr", "1e-3", "--loss.params.beta", "0.1", "--model.precision", "fp32", "--checkpoint.every", "1"),
        *("--checkpoint.keep", "10"),
        *more,
    ]


def train(inputs: Path, output: Path, num_ranks: int, *more: str) -> list[dict[str, Any]]:
    run_ranks(num_ranks, "mpo_megatron.train", options(inputs, output, *more))
    return metrics(output)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def weights(output: Path) -> dict[str, torch.Tensor]:
    exported = output / "exported"
    shutil.rmtree(exported, ignore_errors=True)
    convert(ConvertConfig(input=str(newest_step(output)), output=str(exported)))
    return load_file(exported / "model.safetensors")


def newest_step(output: Path) -> Path:
    return max((output / "checkpoints").glob("step_????????"))


def first_loss(groups: PreparedGroups, indices: np.ndarray) -> float:
    """ln(K / |Y+|), averaged over the groups with a contrast: the loss when policy and reference are the same."""
    values = []
    for index in indices:
        rewards = groups[int(index)].rewards
        assert rewards is not None
        preferred = int((rewards > rewards.mean()).sum())
        if preferred:
            values.append(math.log(len(rewards) / preferred))
    return float(np.mean(values))


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run at TP2."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(inputs, output, 2, "--parallel.tensor", "2")
    return output


def test_first_loss_and_metrics(inputs: Path, undisturbed: Path) -> None:
    from mpo_megatron.data.loader import step_indices
    from mpo_megatron.data.store import load_groups

    lines = metrics(undisturbed)
    steps = [line for line in lines if "loss" in line]
    held_out = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in steps] == list(range(1, STEPS + 1))
    assert [line["step"] for line in held_out] == [0, 3, 6]
    data = load_groups(inputs / "train")
    indices = step_indices(0, len(data), 8, seed=1234, shuffle=True)
    assert steps[0]["loss"] == pytest.approx(first_loss(data, indices), abs=1e-5)
    assert held_out[0]["eval/loss"] == pytest.approx(first_loss(load_groups(inputs / "eval"), np.arange(6)), abs=1e-5)
    assert held_out[0]["eval/accuracy"] == 0.5
    assert held_out[0]["eval/margin"] == pytest.approx(0, abs=1e-4)
    assert sum(line["skipped_groups"] for line in steps) > 0  # the data has groups with all rewards equal
    # The last epoch has seen every group before: the loss is below ln 2-like chance, the margin above 0.
    assert np.mean([line["loss"] for line in steps[3:]]) < np.mean([line["loss"] for line in steps[:3]])
    assert np.mean([line["margin"] for line in steps[3:]]) > 0


def test_killed_run_resumes_bit_for_bit(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = ("mpo_megatron.train", options(inputs, output, "--parallel.tensor", "2"))
    kill_ranks_when((output / "checkpoints" / "step_00000001").exists, 2, *command, tmp_path / "log")
    assert not (output / "checkpoints" / f"step_{STEPS:08d}").exists()
    train(inputs, output, 2, "--parallel.tensor", "2")
    expected, resumed = weights(undisturbed), weights(output)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    timing = ("seconds", "tokens_per_second", "groups_per_second", "tflops_per_rank", "peak_memory_gib")
    timing += ("slowest_rank", "step_seconds_max_over_mean", "data_wait", "xxh3")  # the digest covers times
    same = [{key: value for key, value in line.items() if key not in timing} for line in metrics(output)]
    assert same == [{key: value for key, value in line.items() if key not in timing} for line in metrics(undisturbed)]


def test_resume_on_another_layout_with_other_rows(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(undisturbed, output)
    for step in range(4, STEPS + 1):
        shutil.rmtree(output / "checkpoints" / f"step_{step:08d}")
    # The same weights, and rows that split some groups.
    options = ("--parallel.pipeline", "2", "--data.row_tokens", "96", "--model.checkpoint", str(inputs / "hf"))
    resumed_lines = train(inputs, output, 2, *options)
    assert len(list((output / "converted").glob("hf-*"))) == 1
    expected, resumed = weights(undisturbed), weights(output)
    # Two float32 computations in another order, through three Adam steps of lr 1e-3.
    assert max((resumed[name] - expected[name]).abs().max().item() for name in expected) < 1e-5
    before, after = ({line["step"]: line for line in lines if "loss" in line} for lines in (metrics(undisturbed), resumed_lines))
    assert list(after) == list(range(1, STEPS + 1))
    for step in range(4, STEPS + 1):  # the same groups in the same order
        assert after[step]["loss"] == pytest.approx(before[step]["loss"], rel=1e-5)
        assert after[step]["skipped_groups"] == before[step]["skipped_groups"]


def test_bf16_on_two_replicas(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    lines = train(inputs, tmp_path / "run", 2, "--model.precision", "bf16", "--model.recompute", "full")
    half = [line["loss"] for line in lines if "loss" in line]
    full = [line["loss"] for line in metrics(undisturbed) if "loss" in line]
    # bf16 has 8 bits of mantissa: log-probs of some 100 nats are off by some 0.1, β·s by 0.01.
    assert half == pytest.approx(full, abs=0.05)


def test_other_losses_train(inputs: Path, tmp_path: Path) -> None:
    loss = ("--loss.name", "mcpo", "--loss.params", '{"beta": 0.1, "num_negatives": 1}')
    lines = train(inputs, tmp_path / "run", 1, *loss, "--max_steps", "2")
    shares = [line["backward_share"] for line in lines if "backward_share" in line]
    assert shares
    assert all(0 < share < 1 for share in shares)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--parallel.tensor", "3", "--nproc", "3"), "parallel.tensor = 3 does not divide"),
        (("--parallel.pipeline", "3", "--nproc", "3"), "parallel.pipeline = 3 does not divide"),
        (("--parallel.tensor", "2", "--nproc", "3"), "does not divide the number of ranks, 3"),
        (("--data.row_tokens", "20"), "data.row_tokens = 20 is too short"),
        (("--loss.name", "mpoo"), "mpo"),
        (("--loss.params.gamma", "1"), "no such hyper-parameter"),
        (("--loss.params.beta", "-1"), "beta = -1"),
        (("--model.checkpoint", "/nowhere"), "no such folder"),
        (("--data.train", "/nowhere"), "mpo prepare"),
        (("--model.backend", "transformer_engine"), "no GPU"),
        (("--output", "/proc/run"), "output = /proc/run"),
    ],
)
def test_refused_configurations(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert main(["train", *options(inputs, tmp_path / "run", *more)]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: next(folder.glob("*.distcp")).unlink(), "no such file"),
        (lambda folder: os.truncate(next(folder.glob("*.distcp")), 1000), "truncated: 1,000 bytes"),
        (lambda folder: os.truncate(folder / ".metadata", 100), "damaged"),
        (lambda folder: (folder / "common.pt").unlink(), "common.pt: no such file"),
    ],
)
def test_damaged_checkpoints_are_named(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], None], message: str
) -> None:
    model = tmp_path / "model"
    shutil.copytree(inputs / "model", model)
    damage(model / "megatron")
    assert main(["train", *options(inputs, tmp_path / "run", "--model.checkpoint", str(model))]) == 2
    assert message in capsys.readouterr().err


def test_groups_of_another_tokenizer_are_refused(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_groups(
        tmp_path / "other", random_groups(4), tokenizer_digest="other", vocab_size=250, end_token_ids=[], reward_kind="scores"
    )
    model = ("--model.checkpoint", str(inputs / "hf"))
    assert main(["train", *options(inputs, tmp_path / "run", "--data.train", str(tmp_path / "other"), *model)]) == 2
    said = capsys.readouterr()
    assert "prepared with another tokenizer" in said.err
    assert "is a Hugging Face folder: converting it, once" in said.out


def test_a_reference_of_another_architecture_is_refused(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert(ConvertConfig(input=str(save_model(tmp_path / "hf", num_hidden_layers=2)), output=str(tmp_path / "model")))
    assert main(["train", *options(inputs, tmp_path / "run", "--model.reference", str(tmp_path / "model"))]) == 2
    assert "num_hidden_layers = 2, but model.checkpoint has 4" in capsys.readouterr().err

"""A run whose routers replay the reference's choices and balance experts: killed, resumed, and refused with other options."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.cli import main
from mpo_megatron.config import ConvertConfig
from mpo_megatron.model.convert import convert
from tests.distributed.launch import kill_ranks_when, run_ranks
from tests.distributed.test_train import metrics, weights
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed

STEPS = 4
LAYOUT = ("--parallel.expert", "2")
EXPERTS = ("--experts.balance_coeff", "0.01", "--experts.z_coeff", "0.001", "--experts.routing", "replay")
TIMES = ("seconds", "tokens_per_second", "groups_per_second", "tflops_per_rank", "peak_memory_gib", "slowest_rank")
TIMES += ("step_seconds_max_over_mean", "data_wait", "xxh3")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (model), training groups (train) and held-out groups (eval)."""
    folder = tmp_path_factory.mktemp("experts")
    hf = save_model(folder / "hf", model_type="qwen3_moe", num_hidden_layers=2, norm_topk_prob=True)
    convert(ConvertConfig(input=str(hf), output=str(folder / "model")))
    save_groups(folder / "train", random_groups(16, seed=1), hf)
    save_groups(folder / "eval", random_groups(6, seed=2), hf)
    return folder


def options(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--output", str(output), "--model.checkpoint", str(inputs / "model")),
        *("--data.train", str(inputs / "train"), "--data.eval", str(inputs / "eval")),
        *("--data.groups_per_step", "8", "--data.row_tokens", "256", "--max_steps", str(STEPS), "--eval_every", "0"),
        *("--optimizer.lr", "3e-3", "--loss.params.beta", "0.1", "--model.precision", "fp32", "--checkpoint.every", "1"),
        *("--checkpoint.keep", "10", *more),
    ]


def timeless(output: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES} for line in metrics(output)]


def test_killed_run_resumes_bit_for_bit_and_reads_what_was_recorded(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, output = tmp_path / "whole", tmp_path / "run"
    first = run_ranks(2, "mpo_megatron.train", options(inputs, whole, *LAYOUT, *EXPERTS))
    assert "reference log-probs of train: 16 groups in" in first.stdout
    assert "router_drift is not measured" not in first.stdout
    lines = metrics(whole)
    steps = [line for line in lines if "loss" in line]
    assert all({"load_balancing_loss", "router_z_loss", "router_drift"} <= set(line) for line in steps)
    assert all(1 <= line["load_balancing_loss"] < 4 and line["router_z_loss"] > 0 for line in steps)
    assert steps[0]["router_drift"] == 0  # the weights are the reference's, and float32 has no ties here
    assert 0 < steps[-1]["router_drift"] < 1
    assert [line["eval/router_drift"] > 0 for line in lines if "eval/router_drift" in line] == [False, True]

    command = ("mpo_megatron.train", options(inputs, output, *LAYOUT, *EXPERTS))
    kill_ranks_when((output / "checkpoints" / "step_00000001").exists, 2, *command, tmp_path / "log")
    assert not (output / "checkpoints" / f"step_{STEPS:08d}").exists()
    assert main(["train", *options(inputs, output, *LAYOUT, *EXPERTS[:4], "--nproc", "2")]) == 2
    assert "it was trained with experts.routing = replay" in capsys.readouterr().err
    resumed = run_ranks(2, *command)
    assert "reference log-probs of" not in resumed.stdout  # choices and log-probs are there
    expected, found = weights(whole), weights(output)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert timeless(output) == timeless(whole)


def test_choices_are_recorded_where_only_log_probs_are_there(inputs: Path, tmp_path: Path) -> None:
    """Free routing records no choices and reports this; to measure drift they are computed once, on another layout."""
    more = ("--seed", "3", "--model.reference", str(inputs / "model"), "--max_steps", "1")
    for folder in (inputs / "train", inputs / "eval"):
        for path in folder.glob("reference/*/experts-*"):
            path.unlink()
    free = run_ranks(1, "mpo_megatron.train", options(inputs, tmp_path / "free", *more))
    assert "router_drift is not measured" in free.stdout
    assert not list(inputs.glob("train/reference/*/experts-*"))
    assert not any("router_drift" in line for line in metrics(tmp_path / "free"))
    run_ranks(
        2,
        "mpo_megatron.train",
        options(inputs, tmp_path / "drift", *more, "--parallel.tensor", "2", "--experts.measure_drift", "true"),
    )
    (line,) = [line for line in metrics(tmp_path / "drift") if "loss" in line]
    assert line["router_drift"] == 0
    (plain,) = [line for line in metrics(tmp_path / "free") if "loss" in line]
    assert line["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    assert "load_balancing_loss" not in line
    for name in ("train", "eval"):
        assert list(inputs.glob(f"{name}/reference/*/experts-*.choices"))


def test_an_adapter_replays_the_choices_of_its_base_model(inputs: Path, tmp_path: Path) -> None:
    """With the adapter off the reference chooses in the same process; cached choices give the same run."""
    found = {}
    for name, reference in (("off", ("--model.reference", "adapter_off")), ("cached", ())):
        files = set(inputs.glob("train/reference/*/experts-*"))
        more = ("--max_steps", "2", "--lora.rank", "2", *LAYOUT, *EXPERTS[4:], *reference)
        run_ranks(2, "mpo_megatron.train", options(inputs, tmp_path / name, *more))
        found[name] = [line for line in metrics(tmp_path / name) if "router_drift" in line or "eval/router_drift" in line]
        if name == "off":
            assert set(inputs.glob("train/reference/*/experts-*")) == files  # no file is added
    assert [line["step"] for line in found["off"]] == [0, 1, 2, 2]
    assert found["off"][1]["router_drift"] == 0
    assert found["off"][2]["router_drift"] > 0
    for off, cached in zip(*found.values(), strict=True):
        for name in {"loss", "grad_norm", "router_drift", "eval/loss", "eval/router_drift"} & set(off):
            assert off[name] == pytest.approx(cached[name], rel=1e-4, abs=1e-6)


def test_an_adapter_has_no_losses_of_routers(inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *options(inputs, tmp_path / "run", "--lora.rank", "2", *EXPERTS[:4])]) == 2
    assert "experts.balance_coeff = 0.01, experts.z_coeff = 0.001 with lora: routers are frozen" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["experts.balance_coeff", "experts.z_coeff"])
def test_a_dense_model_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str) -> None:
    convert(ConvertConfig(input=str(save_model(tmp_path / "hf", num_hidden_layers=1)), output=str(tmp_path / "model")))
    for name in ("train", "eval"):
        save_groups(tmp_path / name, random_groups(2, seed=1), tmp_path / "hf")
    assert main(["train", *options(tmp_path, tmp_path / "run", f"--{option}", "0.1")]) == 2
    assert f"{option} = 0.1, but the model of model.checkpoint has no experts" in capsys.readouterr().err
    assert json.loads((tmp_path / "model" / "conversion.json").read_text())  # the model is unchanged

"""Adapters, end to end: a run is killed, resumes on another layout, exports to PEFT, and generates."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from mpo_megatron.config import (
    ConfigError,
    ConvertConfig,
    EvaluateConfig,
    GenerateConfig,
    HeldOutConfig,
    ModelConfig,
    from_dict,
    load_yaml,
)
from mpo_megatron.config.train import TrainConfig
from mpo_megatron.evaluate.held_out import as_training, evaluate_held_out
from mpo_megatron.hf.adapter import read_adapter
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.rollout.generate import generate
from mpo_megatron.train.setup import build_setup
from tests.distributed.launch import kill_ranks_when, run_ranks
from tests.distributed.parity_oracle import round_to_nf4
from tests.distributed.test_train import first_loss, metrics, newest_step
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed

STEPS = 6
TENSOR = ("--parallel.tensor", "2")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model (hf, model) and training groups (train)."""
    folder = tmp_path_factory.mktemp("lora")
    convert(ConvertConfig(input=str(save_model(folder / "hf")), output=str(folder / "model")))
    save_groups(folder / "train", random_groups(24, seed=1), folder / "hf")
    return folder


def options(inputs: Path, output: Path, *more: str) -> list[str]:
    return [
        *("--output", str(output), "--model.checkpoint", str(inputs / "model"), "--data.train", str(inputs / "train")),
        *("--data.groups_per_step", "8", "--data.row_tokens", "256", "--epochs", "2", "--eval_every", "0"),
        *("--optimizer.lr", "1e-2", "--loss.params.beta", "0.1", "--model.precision", "fp32", "--checkpoint.every", "1"),
        *("--checkpoint.keep", "10", "--lora.rank", "4", "--model.reference", "adapter_off"),
        *("--lora.target_modules", "[all-linear, lm_head]"),
        *more,
    ]


def train(inputs: Path, output: Path, *more: str) -> list[dict[str, Any]]:
    run_ranks(2, "mpo_megatron.train", options(inputs, output, *more))
    return metrics(output)


def matrices(step: Path, output: Path) -> dict[str, torch.Tensor]:
    convert(ConvertConfig(input=str(step), output=str(output)))
    return load_file(output / "adapter_model.safetensors")


@pytest.fixture(scope="module")
def undisturbed(inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run at TP2 whose reference is the adapter off."""
    output = tmp_path_factory.mktemp("undisturbed") / "run"
    train(inputs, output, *TENSOR)
    return output


def test_it_starts_at_the_reference_and_learns(inputs: Path, undisturbed: Path) -> None:
    from mpo_megatron.data.loader import step_indices
    from mpo_megatron.data.store import load_groups

    lines = metrics(undisturbed)
    data = load_groups(inputs / "train")
    # Policy and reference are the same forward pass: the first loss is that of equal log-probs, up to float64 rounding.
    expected = first_loss(data, step_indices(0, len(data), 8, seed=1234, shuffle=True))
    assert lines[0]["loss"] == pytest.approx(expected, abs=1e-12)
    assert lines[0]["kl"] == 0
    assert lines[0]["adapter_norm"] == 0
    assert lines[1]["adapter_norm"] > 0
    assert np.mean([line["loss"] for line in lines[3:]]) < np.mean([line["loss"] for line in lines[:3]])
    assert not (inputs / "train" / "reference").exists()


def test_checkpoints_hold_the_adapter_alone(inputs: Path, undisturbed: Path) -> None:
    step = newest_step(undisturbed)
    keys = CheckpointReader(step / "megatron").tensors
    assert keys
    assert all(".adapter." in key for key in keys)
    assert any(key.startswith("optimizer.") for key in keys)
    record = read_adapter(step)
    assert record.base == str(inputs / "model")
    assert record.adapter.rank == 4


def test_a_killed_run_resumes_bit_for_bit_and_on_another_layout(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    output, moved = tmp_path / "run", tmp_path / "moved"
    command = ("mpo_megatron.train", options(inputs, output, *TENSOR))
    kill_ranks_when((output / "checkpoints" / "step_00000002").exists, 2, *command, tmp_path / "log")
    assert not (output / "checkpoints" / f"step_{STEPS:08d}").exists()
    shutil.copytree(output, moved)
    train(inputs, output, *TENSOR)
    train(inputs, moved, "--parallel.pipeline", "2", "--optimizer.overlap", "all")
    expected, resumed, other = (
        matrices(newest_step(run), tmp_path / f"peft-{number}") for number, run in enumerate((undisturbed, output, moved))
    )
    for name, tensor in expected.items():
        assert torch.equal(resumed[name], tensor), name
        # Adam's first steps divide gradients by their own size: near 0, rounding decides a share of the learning rate.
        assert (other[name] - tensor).abs().max() <= 1e-3, name


def test_the_cached_reference_gives_the_same(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    lines = train(inputs, tmp_path / "run", *TENSOR, "--model.reference", "null", "--stop_after", "2")
    assert (inputs / "train" / "reference").exists()
    for ours, theirs in zip(lines, metrics(undisturbed)[:2], strict=True):
        for name in ("loss", "margin", "kl", "grad_norm", "adapter_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-5, abs=1e-5), name
    shutil.rmtree(inputs / "train" / "reference")


def test_what_was_trained_answers_the_same_everywhere(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """PEFT's model, the merged one, and the embedded engine with a separate adapter."""
    convert(ConvertConfig(input=str(undisturbed), output=str(tmp_path / "peft")))
    convert(ConvertConfig(input=str(undisturbed), output=str(tmp_path / "merged"), merge=True))
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (inputs / "hf", tmp_path / "merged"))
    tokens = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 60]])
    with torch.no_grad():
        plain, ours = base(tokens).logits, merged(tokens).logits
        theirs = PeftModel.from_pretrained(base, tmp_path / "peft")(tokens).logits
    assert (plain - theirs).abs().max() > 1e-3
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(3)))
    answers = []
    for name, model in (("run", undisturbed), ("merged", tmp_path / "merged"), ("peft", newest_step(undisturbed) / "exported")):
        settings = {"engine": "transformers", "num_responses": 2, "max_tokens": 6, "empty": "keep", "duplicates": "keep"}
        paths = {"prompts": str(tmp_path / "prompts.jsonl"), "model": str(model), "output": str(tmp_path / f"samples-{name}")}
        lines = generate(from_dict(GenerateConfig, {**settings, **paths}, "generate")).read_text().splitlines()
        answers.append([[response["token_ids"] for response in json.loads(line).get("responses", [])] for line in lines])
    assert answers[0] == answers[1] == answers[2]
    assert len(answers[0]) >= 3


def test_weights_in_four_bits_move_to_another_layout_and_merge(tmp_path: Path) -> None:
    """A run on NF4 weights stops and resumes on another layout; its merged model answers as PEFT on rounded weights does."""
    pytest.importorskip("bitsandbytes")
    inputs = tmp_path
    save_model(inputs / "hf", hidden_size=128, intermediate_size=256, num_hidden_layers=2)
    convert(ConvertConfig(input=str(inputs / "hf"), output=str(inputs / "model")))
    save_groups(inputs / "train", random_groups(16, seed=1), inputs / "hf")
    quantized = ("--lora.quantize", "nf4", "--epochs", "1")
    train(inputs, tmp_path / "run", *TENSOR, *quantized, "--stop_after", "1")
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    lines = train(inputs, tmp_path / "run", *TENSOR, *quantized)
    train(inputs, tmp_path / "moved", *quantized)
    assert lines[0]["kl"] == 0
    assert lines[1]["adapter_norm"] > 0
    step = newest_step(tmp_path / "run")
    assert read_adapter(step).adapter.quantize == "nf4"
    keys = CheckpointReader(step / "megatron").tensors
    assert all(".adapter." in key for key in keys)
    ours, other = (matrices(newest_step(tmp_path / name), tmp_path / f"peft-{name}") for name in ("run", "moved"))
    for name, tensor in ours.items():
        assert (other[name] - tensor).abs().max() <= 1e-3, name  # as after a move without 4 bits
    convert(ConvertConfig(input=str(tmp_path / "run"), output=str(tmp_path / "merged"), merge=True))
    base, merged = (AutoModelForCausalLM.from_pretrained(path) for path in (inputs / "hf", tmp_path / "merged"))
    tokens = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 60]])
    with torch.no_grad():
        whole = PeftModel.from_pretrained(base, tmp_path / "peft-run")(tokens).logits
        base = AutoModelForCausalLM.from_pretrained(inputs / "hf")
        round_to_nf4(base)
        theirs, ours_merged = PeftModel.from_pretrained(base, tmp_path / "peft-run")(tokens).logits, merged(tokens).logits
    assert (ours_merged - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    assert (ours_merged - whole).abs().max() > 1e-3 * theirs.abs().max()


def test_held_out_groups_are_measured_against_the_base_model(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    """`mpo evaluate` with the reference given by `adapter_off` or by the base model's folder."""
    found = []
    for number, reference in enumerate(("adapter_off", str(inputs / "model"))):
        held_out = HeldOutConfig(
            groups=str(inputs / "train"),
            model=ModelConfig(checkpoint=str(undisturbed), reference=reference, precision="fp32"),
            row_tokens=256,
        )
        config = as_training(EvaluateConfig(output=str(tmp_path / str(number)), held_out=held_out))
        found.append(evaluate_held_out(build_setup(config, 1)))
    assert found[0] == found[1]
    assert len(found[0]) == 24
    accuracy = sum(group.totals["accuracy"] for group in found[0]) / sum(group.counts["accuracy"] for group in found[0])
    assert accuracy > 0.55  # it was trained on them for two epochs


def test_an_adapter_continues_and_refuses_another_base(inputs: Path, undisturbed: Path, tmp_path: Path) -> None:
    step = newest_step(undisturbed)
    config = load_yaml(TrainConfig, save_config(inputs, tmp_path, step))
    found = build_setup(config, 1)
    assert found.record == read_adapter(step)
    assert not found.adapter_off_is_reference  # the reference is the initial policy, with its adapter
    wrong = load_yaml(TrainConfig, save_config(inputs, tmp_path, step, lora={"rank": 8}))
    with pytest.raises(ConfigError, match=r"holds an adapter with rank = 4, but lora.rank = 8; remove lora"):
        build_setup(wrong, 1)
    save_model(tmp_path / "hf", seed=9)
    convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "other")))
    moved = load_yaml(TrainConfig, save_config(inputs, tmp_path, step, lora={"base": str(tmp_path / "other")}))
    with pytest.raises(ConfigError, match=r"other holds other weights .* set lora.base"):
        build_setup(moved, 1)
    full = load_yaml(TrainConfig, save_config(inputs, tmp_path, inputs / "model", model={"reference": "adapter_off"}))
    with pytest.raises(ConfigError, match="no adapter to switch off"):
        build_setup(full, 1)


def save_config(inputs: Path, folder: Path, checkpoint: Path, **sections: dict[str, Any]) -> Path:
    content: dict[str, Any] = {
        "output": str(folder / "run"),
        "model": {"checkpoint": str(checkpoint), "precision": "fp32", **sections.pop("model", {})},
        "data": {"train": str(inputs / "train"), "row_tokens": 256},
        **sections,
    }
    path = folder / "config.json"
    path.write_text(json.dumps(content))
    return path

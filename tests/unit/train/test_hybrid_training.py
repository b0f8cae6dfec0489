"""Training a model with Gated DeltaNets in bf16: the parameters of its decays stay float32, also in checkpoints."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from safetensors.torch import load_file

from mpo_megatron.config import CheckpointConfig, ConvertConfig, DataConfig, ModelConfig, TrainConfig
from mpo_megatron.model.convert import convert
from mpo_megatron.train.checkpoints.step_folders import complete_steps
from tests.tiny import random_groups, save_groups, save_model
from tests.training import train

STATE = ("A_log", "dt_bias")


def test_a_resumed_run_in_bf16_is_the_run_that_was_not_stopped(tmp_path: Path) -> None:
    kinds = ["linear_attention", "full_attention"]
    hf = save_model(tmp_path / "hf", model_type="qwen3_5_text", num_hidden_layers=2, layer_types=kinds)
    convert(ConvertConfig(input=str(hf), output=str(tmp_path / "model")))
    save_groups(tmp_path / "train", random_groups(8, seed=1), hf)
    config = TrainConfig(
        output=str(tmp_path / "whole"),
        model=ModelConfig(checkpoint=str(tmp_path / "model"), precision="bf16"),
        data=DataConfig(train=str(tmp_path / "train"), groups_per_step=4, row_tokens=256),
        checkpoint=CheckpointConfig(every=1),
        max_steps=2,
    )
    train(config)
    parts = dataclasses.replace(config, output=str(tmp_path / "parts"))
    train(dataclasses.replace(parts, stop_after=1))
    train(parts)
    exported = []
    for name in ("whole", "parts"):
        assert complete_steps(tmp_path / name)[-1].name == "step_00000002"
        convert(ConvertConfig(input=str(tmp_path / name), output=str(tmp_path / f"{name}-hf")))
        exported.append(load_file(tmp_path / f"{name}-hf" / "model.safetensors"))
    first, second = exported
    start = load_file(hf / "model.safetensors")
    assert first.keys() == second.keys() == start.keys()
    for name, weight in first.items():
        assert torch.equal(weight, second[name]), name
        assert weight.dtype is (torch.float32 if name.endswith(STATE) else torch.bfloat16), name
        assert not torch.equal(weight, start[name].to(weight.dtype)) or weight.dtype is torch.bfloat16, name

"""`mpo evaluate` on held-out groups: the same numbers on two ranks as in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpo_megatron.cli import main
from mpo_megatron.config import ConvertConfig, EvaluateConfig, HeldOutConfig, ModelConfig
from mpo_megatron.evaluate.held_out import as_training, evaluate_held_out, summarize
from mpo_megatron.model.convert import convert
from mpo_megatron.rollout import stages
from mpo_megatron.train.setup import build_setup
from tests.distributed.launch import launch_ranks
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed


def test_held_out_groups_on_two_ranks(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "launch", launch_ranks)
    for role, seed in (("policy-hf", 1), ("reference", 2)):
        save_model(tmp_path / role, seed=seed, num_hidden_layers=2, hidden_size=32)
    convert(ConvertConfig(input=str(tmp_path / "policy-hf"), output=str(tmp_path / "policy")))
    save_groups(tmp_path / "groups", random_groups(9, seed=5), tmp_path / "policy-hf")
    options = [
        *("--held_out.groups", str(tmp_path / "groups"), "--held_out.row_tokens", "256", "--held_out.model.precision", "fp32"),
        *("--held_out.model.checkpoint", str(tmp_path / "policy"), "--held_out.parallel.tensor", "2"),
    ]
    command = ["evaluate", "--output", str(tmp_path / "out"), "--num_resamples", "50", *options]
    assert main(command) == 2
    assert "held_out.model.reference = None" in capfd.readouterr().err
    assert main([*command, "--held_out.model.reference", str(tmp_path / "reference")]) == 0  # a Hugging Face folder
    assert len(list((tmp_path / "out" / "converted").glob("reference-*"))) == 1
    result = json.loads((tmp_path / "out" / "evaluation.json").read_text())["held_out"]
    model = ModelConfig(checkpoint=str(tmp_path / "policy"), reference=str(tmp_path / "reference"), precision="fp32")
    config = HeldOutConfig(groups=str(tmp_path / "groups"), model=model, row_tokens=256)
    expected = summarize(
        evaluate_held_out(build_setup(as_training(EvaluateConfig(output=str(tmp_path / "one"), held_out=config)), 1)),
        num_resamples=50,
        seed=1234,
    )
    assert result["groups"] == 9
    assert result["accuracy"] == pytest.approx(expected["accuracy"])
    assert result["margin"] == pytest.approx(expected["margin"], abs=1e-4)
    assert (tmp_path / "out" / "evaluation.png").is_file()

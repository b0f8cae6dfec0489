"""Implicit-reward accuracy and margins of held-out groups, against plain Hugging Face models in float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConfigError, ConvertConfig, EvaluateConfig, HeldOutConfig, ModelConfig, ParallelConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.store import load_groups
from mpo_megatron.evaluate.evaluate import evaluate as run_evaluate
from mpo_megatron.evaluate.held_out import GroupMetrics, as_training, describe_training, evaluate_held_out, read_groups, summarize
from mpo_megatron.files import DataError
from mpo_megatron.model.convert import convert
from mpo_megatron.train.setup import build_setup
from tests.run_folder import write_data, write_run
from tests.tiny import random_groups, save_groups, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models (policy, reference) and held-out groups (groups)."""
    folder = tmp_path_factory.mktemp("held_out")
    for role, seed in (("policy", 1), ("reference", 2)):
        hf = save_model(folder / f"{role}-hf", seed=seed, num_hidden_layers=2, hidden_size=32)
        convert(ConvertConfig(input=str(hf), output=str(folder / role)))
    save_groups(folder / "groups", random_groups(9, seed=5), folder / "policy-hf")
    return folder


def held_out(folder: Path, **model: str) -> HeldOutConfig:
    names = {"checkpoint": str(folder / "policy"), "reference": str(folder / "reference"), **model}
    return HeldOutConfig(groups=str(folder / "groups"), model=ModelConfig(precision="fp32", **names), row_tokens=256)


def evaluate(config: HeldOutConfig, output: Path, groups_per_step: int = 128) -> list[GroupMetrics]:
    """Evaluates on one rank, in this process."""
    return evaluate_held_out(build_setup(as_training(EvaluateConfig(output=str(output), held_out=config), groups_per_step), 1))


def test_a_layout_is_refused_before_a_conversion(folder: Path, tmp_path: Path) -> None:
    for num_ranks, message in ((3, r"parallel\.tensor = 3 does not divide"), (4, "the number of ranks")):
        config = replace(held_out(folder, checkpoint=str(folder / "policy-hf")), parallel=ParallelConfig(tensor=3))
        with pytest.raises(ConfigError, match=message):
            run_evaluate(EvaluateConfig(output=str(tmp_path / "out"), held_out=config), num_ranks)
    assert not (tmp_path / "out").exists()


def log_ratios(folder: Path, group: TokenizedGroup) -> np.ndarray:
    """log π − log π_ref of a group's responses."""
    values = []
    for response in group.response_tokens:
        tokens = torch.from_numpy(np.concatenate([group.prompt_tokens, response]).astype(np.int64))[None]
        sums = []
        for role in ("policy", "reference"):
            model = AutoModelForCausalLM.from_pretrained(folder / f"{role}-hf", dtype=torch.float64)
            with torch.no_grad():
                logps = model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None])
            sums.append(float(logps[-len(response) :].sum()))
        values.append(sums[0] - sums[1])
    return np.array(values)


def test_accuracy_and_margin(folder: Path, tmp_path: Path) -> None:
    # Two groups at a time: results do not depend on the split of the data.
    results = evaluate(held_out(folder), tmp_path, groups_per_step=2)
    right, pairs, margins = 0.0, 0, []
    for group in load_groups(folder / "groups"):
        assert group.rewards is not None
        ratio, better = log_ratios(folder, group), group.rewards > group.rewards.mean()
        if better.any() and not better.all():
            right += float((ratio[better][:, None] > ratio[~better][None]).sum())
            pairs += int(better.sum() * (~better).sum())
            margins.append(ratio[better].mean() - ratio[~better].mean())
    summary = summarize(results, num_resamples=200, seed=1)
    assert summary["groups"] == 9
    assert summary["without_contrast"] == 9 - len(margins)
    assert summary["accuracy"]["value"] == pytest.approx(right / pairs)
    assert summary["margin"]["value"] == pytest.approx(np.mean(margins), abs=1e-4)
    assert summary["margin"]["low"] < summary["margin"]["value"] < summary["margin"]["high"]
    assert read_groups(tmp_path / "held_out.jsonl") == results
    assert (folder / "groups" / "reference").is_dir()  # where a training run will find them


def test_a_policy_that_is_its_reference_prefers_nothing(folder: Path, tmp_path: Path) -> None:
    results = evaluate(held_out(folder, checkpoint=str(folder / "reference")), tmp_path)
    summary = summarize(results, num_resamples=9, seed=1)
    assert summary["accuracy"]["value"] == 0.5
    assert summary["margin"]["value"] == pytest.approx(0, abs=1e-4)


def test_refusals(folder: Path, tmp_path: Path) -> None:
    config = held_out(folder)
    with pytest.raises(ConfigError, match="reference"):
        evaluate(HeldOutConfig(groups=config.groups, model=ModelConfig(checkpoint=str(folder / "policy"))), tmp_path)
    equal = [TokenizedGroup(**{**vars(group), "rewards": np.ones(group.num_responses)}) for group in random_groups(2)]
    save_groups(tmp_path / "equal", equal, folder / "policy-hf")
    results = evaluate(HeldOutConfig(groups=str(tmp_path / "equal"), model=config.model, row_tokens=256), tmp_path / "out")
    with pytest.raises(DataError, match="none of 2 held-out groups"):
        summarize(results, num_resamples=9, seed=1)
    kept = read_groups(tmp_path / "out" / "held_out.jsonl")
    assert len(kept) == 2
    assert kept[0].counts["margin"] == 0


def test_groups_that_the_run_was_trained_on_are_named(tmp_path: Path) -> None:
    data, other = write_data(tmp_path / "groups"), write_data(tmp_path / "other", seed=1)
    run = write_run(tmp_path / "run", data)
    for checkpoint, groups, found in (
        (run, data, True),
        (run / "checkpoints" / "step_00000040", data, True),
        (run, other, False),
        (tmp_path / "elsewhere", data, False),
    ):
        config = HeldOutConfig(groups=str(groups.path), model=ModelConfig(checkpoint=str(checkpoint)))
        assert ("was trained on" in str(describe_training(config))) == found

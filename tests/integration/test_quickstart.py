"""The quickstart at smaller size: the pipeline's commands in order, in this process; `.ci/run` starts them as a user does."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path

import pytest

from examples.quickstart import run as quickstart
from examples.quickstart.task import WORDS, build_groups, compute_reward
from mpo_megatron import cli
from mpo_megatron.train import launcher
from tests.distributed.launch import launch_ranks

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("MPO_DATA", ROOT.parent / "shared" / "data"))


def run_here(output: Path, *arguments: str) -> None:
    """A quickstart in this process, with forked ranks: imports would take longer than the work."""

    def mpo(command: str, **options: object) -> None:
        assert cli.main([command, *(part for name, value in options.items() for part in (f"--{name}", str(value)))]) == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(quickstart, "mpo", mpo)
        patch.setattr(launcher, "launch", launch_ranks)
        assert quickstart.main(["--output", str(output), *arguments]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Output folder of a run on the procedural task."""
    output = tmp_path_factory.mktemp("quickstart") / "out"
    run_here(output, "--steps", "40", "--groups", "600", "--held-out", "60")
    return output


@pytest.mark.slow
def test_policy_learned(finished: Path) -> None:
    result = json.loads((finished / "quickstart.json").read_text())
    assert result["num_groups"] >= 50
    assert result["ratio_accuracy"] > 0.8
    assert result["margin"] > 2.0
    # Random weights score at chance; 60 groups × 16 pairs leave a few percent of noise.
    assert abs(result["plain_accuracy_before"] - 0.5) < 0.1
    assert result["plain_accuracy_after"] > 0.8
    assert (finished / "curves.png").stat().st_size > 10_000


@pytest.mark.slow
def test_export_loads_in_transformers(finished: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(finished / "aligned")
    model, loading = AutoModelForCausalLM.from_pretrained(finished / "aligned", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    start = AutoModelForCausalLM.from_pretrained(finished / "start")
    assert model.config.to_dict() == start.config.to_dict() | {"_name_or_path": model.config._name_or_path}
    moved = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, start.state_dict()[name])]
    assert len(moved) > len(model.state_dict()) / 2
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Name 2 fruits for a quiz."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] > prompt["input_ids"].shape[1]


def run_on_data(name: str, folder: Path, rows: int, *arguments: str) -> Path:
    """A quickstart on the first rows of a file of real data, which are copied to `excerpt.jsonl`; its output folder."""
    source = DATA / name
    if not source.is_file():
        pytest.skip(f"no real data; set MPO_DATA to the folder that holds {name}")
    excerpt, output = folder / "excerpt.jsonl", folder / "out"
    with source.open(encoding="utf-8") as lines:
        excerpt.write_text("".join(itertools.islice(lines, rows)), encoding="utf-8")
    run_here(output, "--data", str(excerpt), *arguments)
    return output


@pytest.mark.slow
def test_eight_rated_answers_per_instruction(tmp_path: Path) -> None:
    output = run_on_data("alpaca_eval_k8.jsonl", tmp_path, 60, "--steps", "5", "--held-out", "15")
    assert json.loads((output / "quickstart.json").read_text())["num_groups"] == 15
    metrics = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in metrics if "lr" in row] == [1, 2, 3, 4, 5]


@pytest.mark.slow
def test_training_skips_groups_without_contrast(tmp_path: Path) -> None:
    output = run_on_data("gsm8k_k4.jsonl", tmp_path, 40, "--steps", "2", "--held-out", "8")
    metrics = [json.loads(line) for line in (output / "run" / "metrics.jsonl").read_text().splitlines()]
    assert sum(row.get("skipped_groups", 0) for row in metrics) > 0
    groups = [json.loads(line) for line in (tmp_path / "excerpt.jsonl").read_text(encoding="utf-8").splitlines()]
    without = sum(len({response["reward"] for response in group["responses"]}) == 1 for group in groups)
    infos = [json.loads((output / name / "prepare.json").read_text()) for name in ("groups", "groups-eval")]
    assert sum(info["statistics"]["without_contrast"] for info in infos) == without > 0


def test_foreign_folder_is_not_cleared(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit, match="choose another"):
        quickstart.main(["--output", str(tmp_path)])
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_rewards_are_verifiable() -> None:
    assert compute_reward("fruits", "apple, hammer, plum, violin") == 0.5
    groups = build_groups(200, seed=1)
    assert len({group["prompt"] for group in groups}) == 200
    for group in groups:
        (kind,) = [name for name in WORDS if f" {name}" in group["prompt"]]
        for response in group["responses"]:
            assert response["reward"] == compute_reward(kind, response["text"])


def test_no_word_belongs_to_two_kinds() -> None:
    words = [word for kind in WORDS.values() for word in kind]
    assert len(words) == len(set(words))

"""`make example` with a tiny random model instead of the pretrained one: everything except learning."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from examples.instructions import run as example
from mpo_megatron import cli
from mpo_megatron.rollout import stages
from tests.distributed.launch import launch_ranks
from tests.tiny import save_model

SMALLER = {
    "held_out": 4,
    "nproc": 1,
    "generate.num_responses": 4,
    "generate.max_tokens": 8,
    "generate.empty": "keep",
    "select.duplicates": "keep",
    "train.data.groups_per_step": 4,
}


@pytest.mark.distributed
def test_the_example_with_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = []
    (tmp_path / "vowels.py").write_text("def vowels(response):\n    return sum(c in 'aeiou' for c in response) / 8\n")
    # Random bytes follow no instruction.
    vowels = {"vowels": {"kind": "function", "function": f"{tmp_path / 'vowels.py'}:vowels"}}
    smaller = {**SMALLER, "score.scorers": json.dumps(vowels)}

    def align(**options: object) -> None:
        calls.append(options["output"])
        arguments = [part for name, value in {**options, **smaller}.items() for part in (f"--{name}", str(value))]
        assert cli.main(["align", *arguments]) == 0

    monkeypatch.setattr(stages, "launch", launch_ranks)
    monkeypatch.setattr(example, "align", align)
    monkeypatch.setattr(example, "NUM_PROMPTS", 20)
    monkeypatch.setattr(example, "write_model", lambda folder: save_model(folder, num_hidden_layers=1, hidden_size=32))
    example.main(["--output", str(tmp_path / "out")])  # a rise of the reward would be chance
    result = json.loads((tmp_path / "out" / "instructions.json").read_text())["seeds"]["0"]
    assert result["before"]["prompts"] == result["after"]["prompts"] == 4
    assert 0 <= result["after"]["reward"] <= 1
    assert (tmp_path / "out" / "mpo" / "aligned" / "config.json").is_file()
    assert f"seed 0: {result['before']['reward']:.3f}" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "out" / "mpo" / "rounds" / "rounds" / "01" / "samples")  # a finished stage's input is not needed
    example.main(["--output", str(tmp_path / "out")])
    assert calls == [tmp_path / "out" / "mpo"] * 2

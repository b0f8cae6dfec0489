"""`python -m examples.papers` with a tiny random model: samples, three trials, page; then again with nothing left to do."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.papers import samples, trial
from examples.papers.run import main
from mpo_megatron.rollout import stages
from tests.distributed.launch import launch_ranks
from tests.tiny import save_model

METHODS = ["mpo", "mpo_k2", "mpo_segments"]
SMALL = ["--prompts", "20", "--held-out", "3", "--max-tokens", "6", "--methods", *METHODS, "--seeds", "0"]


@pytest.mark.distributed
def test_methods_from_one_set_of_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stages, "launch", launch_ranks)
    (tmp_path / "vowels.py").write_text("def vowels(response):\n    return sum(c in 'aeiou' for c in response) / 8\n")
    # Random bytes never follow an instruction.
    monkeypatch.setitem(samples.SCORERS["instructions"], "function", f"{tmp_path / 'vowels.py'}:vowels")
    monkeypatch.setattr(samples, "write_model", lambda folder: save_model(folder, num_hidden_layers=1, hidden_size=32))
    folder = tmp_path / "out"
    assert main(["--output", str(folder), *SMALL]) == 0
    record = json.loads((folder / "papers.json").read_text())
    assert set(record["results"]) == {"start", *METHODS}
    assert all(len(record["results"][name]["0"]["reward"]) == 3 for name in record["results"])
    eight, two, renewed = (record["results"][name]["0"] for name in METHODS)
    assert eight["steps"] == two["steps"] == renewed["steps"] == 5
    assert eight["tokens"] > two["tokens"]
    assert not (folder / "trials" / "mpo" / "seed_0" / "run").exists()
    assert not (folder / "trials" / "mpo_segments" / "seed_0" / "rounds").exists()
    page = (folder / "papers.md").read_text()
    assert "`mpo` − `mpo_k2`" in page
    assert "`dpo`" in page.partition("## Not run yet")[2]

    monkeypatch.setattr(trial, "run_training", lambda *_: pytest.fail("a trial that was done"))
    assert main(["--output", str(folder), *SMALL]) == 0
    assert json.loads((folder / "papers.json").read_text())["results"] == record["results"]

"""Samples of the policy as it trains: weights gathered from shards, SPO's regulariser, and runs that keep both."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpo_megatron.config import ConvertConfig
from mpo_megatron.model.convert import convert
from tests.distributed.launch import run_ranks
from tests.tiny import random_groups, save_groups, save_model

pytestmark = pytest.mark.distributed

# Of the largest gradient: float32 matrix products through two layers against float64.
TOLERANCE = 5e-6


def test_regulariser_and_live_weights_on_two_ranks(tmp_path: Path) -> None:
    for role, seed in (("policy", 1), ("reference", 2)):
        hf = save_model(tmp_path / f"{role}-hf", seed=seed, num_hidden_layers=2, hidden_size=32, tied=True)
        convert(ConvertConfig(input=str(hf), output=str(tmp_path / role)))
    # Several rows and, with two replicas, samples of one prompt on both.
    save_groups(tmp_path / "samples", random_groups(5, seed=3, max_responses=4), tmp_path / "policy-hf")
    save_groups(tmp_path / "groups", random_groups(4, seed=4, tied_share=0), tmp_path / "policy-hf")
    spec = {
        "folder": str(tmp_path),
        "layouts": [{"tensor": 2}, {}, {"context": 2}],
        "results": str(tmp_path / "results.json"),
    }
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    run_ranks(2, "tests.distributed.live_worker", [str(tmp_path / "spec.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == 3
    for result in results:
        assert result["missing"] == [], result
        assert result["weights"] == 0, result
        assert result["kl"] == pytest.approx(result["expected_kl"], rel=1e-5), result
        assert result["gradients"] <= TOLERANCE * result["largest"], result
        # A step's gradients are the sum of both: nothing is reduced twice.
        assert result["sum"] <= 1e-6 * max(result["largest"], result["loss_largest"]), result
        assert result["loss_largest"] > 0

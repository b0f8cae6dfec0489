"""For every loss: a two-phase step has the same gradients as a fused one, also when groups span several rows and replicas."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpo_megatron.config import ConvertConfig
from mpo_megatron.losses import build_params, get_loss, list_losses
from mpo_megatron.model.convert import convert
from tests.distributed.launch import run_ranks
from tests.guide import guide_loss
from tests.tiny import random_groups, save_groups, save_model
from tests.tolerances import reordered

pytestmark = pytest.mark.distributed

# Of the largest gradient: products of some 500 tokens, summed row by row.
TOLERANCE = reordered(500)
# Non-default hyper-parameters where the defaults would leave a branch untested.
CHANGES: dict[str, list[dict[str, Any]]] = {
    "mpo": [{"beta": 0.1}, {"beta": 0.1, "partition": "top_bottom", "num_top": 1, "num_bottom": 1}],
    "mcpo": [{"beta": 0.1, "num_negatives": 1}, {"beta": 0.1, "num_negatives": 2, "sampling": "random"}],
    "dpo": [{"pairing": "best_worst"}, {"pairing": "cross_pairs"}, {"pairing": "best_random"}],
    "spo": [{"alpha": 0.1, "gamma": 0.01}, {"alpha": 0.1, "gamma": 0.0, "form": "ranked"}],
    "infonca": [{"alpha": 1.0, "beta": 0.1}],
    "nca": [{"alpha": 1.0, "beta": 0.1}],
}


# Layouts differ in how they compute log-probs, not in what a loss does with them: these losses have every need of a loss.
KINDS = ("mpo", "mcpo", "bco", "simpo", "cpo", "sft", "grpo_offline")


def all_losses() -> list[dict[str, Any]]:
    found = [{"name": loss.name, "params": params} for loss in list_losses() for params in CHANGES.get(loss.name, [{}])]
    return [loss for loss in found if ":" not in loss["name"]]  # users' losses are registered on demand


def needs(losses: list[dict[str, Any]]) -> set[str]:
    """What these losses need, such as lengths or the whole batch."""
    found = (get_loss(loss["name"]).needs(build_params(loss["name"], loss["params"])) for loss in losses)
    return {name for one in found for name, needed in vars(one).items() if needed}


def run_layouts(
    folder: Path, num_ranks: int, layouts: list[dict[str, Any]], losses: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    for role, seed in (("policy", 1), ("reference", 2)):
        hf = save_model(folder / f"{role}-hf", seed=seed, num_hidden_layers=2, hidden_size=32)
        convert(ConvertConfig(input=str(hf), output=str(folder / role)))
    save_groups(
        folder / "groups", random_groups(5, seed=7, prompt_tokens=(5, 12), response_tokens=(22, 30)), folder / "policy-hf"
    )
    spec = {"folder": str(folder), "layouts": layouts, "losses": losses, "results": str(folder / "results.json")}
    (folder / "spec.json").write_text(json.dumps(spec))
    run_ranks(num_ranks, "tests.distributed.equivalence_worker", [str(folder / "spec.json")])
    return [result for layout in json.loads((folder / "results.json").read_text()) for result in layout]


def check(results: list[dict[str, Any]]) -> None:
    assert results
    for result in results:
        assert result["largest"] > 0, result  # a loss without a gradient would match anything
        assert result["split_groups"] > 0 or result["loss"]["name"] == "sft", result  # sft scores one response per group
        assert result["two_phase"] <= TOLERANCE, result
        assert result["split"] <= TOLERANCE, result
        losses, fused = result["losses"]
        assert any(losses), result
        if fused is not None:  # the same formula on the same numbers, a row or the whole batch at a time
            np.testing.assert_allclose(fused, losses, rtol=1e-6, atol=1e-12)


def test_divergence_over_the_vocabulary_on_two_ranks(tmp_path: Path) -> None:
    losses = [
        {
            "name": "spo",
            "params": {"alpha": 0.1, "gamma": gamma, "form": "ranked", "regularizer": "token_kl"},
            "offload": gamma == 0.0,  # moves the reference's weights off the device between uses
        }
        for gamma in (0.0, 0.01)
    ]
    results = run_layouts(tmp_path, 2, [{"tensor": 2}, {"context": 2}, {"pipeline": 2}, {}], losses)
    check(results)
    divergences = np.array([result["kl"] for result in results])
    assert np.abs(divergences).max() > 1
    # Float32 sums in another order; the last layout has each model whole on one rank.
    np.testing.assert_allclose(divergences, np.broadcast_to(divergences[-1], divergences.shape), rtol=1e-4, atol=1e-5)


def test_every_loss_on_two_ranks(tmp_path: Path) -> None:
    own = {"name": "mpo", "function": guide_loss(tmp_path), "params": {"margin": 2.0}}
    results = run_layouts(tmp_path / "replicas", 2, [{}], [*all_losses(), own])
    of_a_kind = [loss for loss in all_losses() if loss["name"] in KINDS]
    assert needs(of_a_kind) == needs(all_losses())
    results += run_layouts(tmp_path / "parts", 2, [{"tensor": 2}, {"pipeline": 2}], of_a_kind)
    check(results)
    shares = {json.dumps(result["loss"]): result["backward_share"] for result in results}
    # MC-PO's backward pass has only the chosen response and the drawn negatives.
    assert all(share < 1 for loss, share in shares.items() if json.loads(loss)["name"] == "mcpo")

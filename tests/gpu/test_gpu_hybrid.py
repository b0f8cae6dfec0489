"""On a GPU: a model with Gated DeltaNets, with flash-linear-attention's kernels, against plain operations in float32."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from mpo_megatron.data.loader import group_table, pack
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import missing_for_recipe, missing_for_transformer_engine
from mpo_megatron.stack.delta_kernels import broken_delta_kernels, missing_for_delta_kernels
from mpo_megatron.train.step import collect_logps, forward_step, fused_step, run_rows
from tests.gpu import small

pytestmark = pytest.mark.gpu

VARIANTS: list[dict[str, Any]] = [
    {"backend": "local", "delta_rule": "torch"},
    {"backend": "local", "delta_rule": "fla"},
    {"backend": "local", "delta_rule": "fla", "recompute": "selective"},
    {"backend": "transformer_engine", "delta_rule": "fla"},
    {"backend": "transformer_engine", "delta_rule": "fla", "fp8": "current"},
]


@pytest.fixture(params=VARIANTS, ids=lambda options: "-".join(options.values()))
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = request.param
    missing = missing_for_transformer_engine() if chosen["backend"] != "local" else None
    missing = missing or (missing_for_recipe(chosen["fp8"]) if "fp8" in chosen else None)
    if chosen["delta_rule"] == "fla":
        missing = missing or missing_for_delta_kernels() or broken_delta_kernels()
    if missing:
        pytest.skip(missing)
    return chosen


def test_log_probs_and_gradients_are_near_float32(ranks: Ranks, options: dict[str, Any]) -> None:
    found = []
    for settings in ({"precision": "fp32", "backend": "local"}, options):
        config = small.model_config(**settings)
        batch = small.batch(config)
        parts = small.build(config, ranks, model=small.hybrid())
        reference = forward_step(parts, batch, small.OBJECTIVE, ranks)
        model, _ = small.wrap(parts, ranks)
        policy = fused_step(model, batch, reference, small.OBJECTIVE, ranks).policy
        assert small.mean_loss(batch, policy, reference) == pytest.approx(small.first_loss(batch), abs=1e-5)
        gradients = {name: item.main_grad.clone() for name, item in small.plain_names(parts[0]).items()}
        found.append((small.per_token(batch, policy), gradients))
    (exact, expected), (logps, gradients) = found
    # Of log-probs near −7: bf16 has 8 bits, FP8 has 4.
    assert np.abs(logps - exact).max() <= (0.3 if "fp8" in options else 5e-2)
    assert expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(gradient.flatten().double(), expected[name].flatten().double(), dim=0)
        assert cosine > (0.9 if "fp8" in options else 0.98), (name, float(cosine))


def test_siblings_change_no_log_prob(ranks: Ranks, options: dict[str, Any]) -> None:
    config = small.model_config(**options)
    parts = small.build(config, ranks, model=small.hybrid())
    found = []
    for shift in (0, 1):
        groups = [
            dataclasses.replace(
                group,
                response_tokens=tuple(
                    tokens if k == 0 else (tokens + shift) % small.VOCAB for k, tokens in enumerate(group.response_tokens)
                ),
            )
            for group in small.GROUPS
        ]
        table = group_table(groups, np.arange(len(groups)))
        _, rows = pack(table, groups, table.valid, small.row_shape(config))
        found.append(collect_logps(run_rows(parts, rows, ranks, None), table.valid.shape, ranks).response)
    if "fp8" not in options:  # its scales depend on all of a row's tokens
        assert torch.equal(found[0][:, 0], found[1][:, 0])
    assert not torch.equal(found[0][:, 1], found[1][:, 1])

"""On a GPU with FP8: each recipe starts at the exact loss, stays near bf16, learns, and resumes from a checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpo_megatron.config import ConfigError, ParallelConfig
from mpo_megatron.hf.fp8 import RECIPES
from mpo_megatron.mcore.weights import unwrap
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import missing_for_recipe, missing_for_transformer_engine, validate_fp8
from mpo_megatron.train import optimizer
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.step import forward_step, fused_step, two_phase_step
from tests.gpu import small

pytestmark = pytest.mark.gpu

VARIANTS = [
    *({"fp8": name} for name in RECIPES),
    {"fp8": "current", "fp8_bf16_layers": 1},
    {"fp8": "blockwise", "fp8_bf16_layers": 1},
    {"fp8": "current", "fp8_params": True},
    {"fp8": "blockwise", "fp8_params": True},
    {"fp8": "current", "recompute": "full"},
]


@pytest.fixture(params=VARIANTS, ids=lambda options: "-".join(f"{value}" for value in options.values()))
def options(request: pytest.FixtureRequest) -> dict[str, object]:
    missing = missing_for_transformer_engine() or missing_for_recipe(request.param["fp8"])
    if missing:
        pytest.skip(missing)
    return request.param


def test_a_missing_recipe_is_refused() -> None:
    if missing_for_transformer_engine():
        pytest.skip("no Transformer Engine")
    for name in RECIPES:
        if missing_for_recipe(name):
            with pytest.raises(ConfigError, match=f"model.fp8 = {name}, but "):
                validate_fp8(small.model_config(fp8=name), ParallelConfig(), small.family())


@pytest.mark.parametrize("two_phase", [False, True])
def test_starts_at_the_exact_loss_and_learns(ranks: Ranks, options: dict[str, object], two_phase: bool) -> None:
    config = small.model_config(**options)
    validate_fp8(config, ParallelConfig(), small.family())
    batch = small.batch(config)
    parts = small.build(config, ranks)
    reference = forward_step(parts, batch, small.OBJECTIVE, ranks)
    assert torch.equal(reference.response, forward_step(parts, batch, small.OBJECTIVE, ranks).response)
    model, adam = small.wrap(parts, ranks)
    losses = []
    for _ in range(5):
        optimizer.zero_gradients(model, adam)
        if two_phase:
            policy = two_phase_step(
                model, batch, reference, small.OBJECTIVE, ranks, small.row_shape(config), torch.Generator()
            ).policy
        else:
            policy = fused_step(model, batch, reference, small.OBJECTIVE, ranks).policy
        losses.append(small.mean_loss(batch, policy, reference))
        changed, norm = optimizer.update(model, adam)
        assert changed
        assert np.isfinite(norm)
        assert norm > 0
    assert losses[0] == pytest.approx(small.first_loss(batch), abs=1e-5)
    assert losses[-1] < losses[0]


def test_near_bf16(ranks: Ranks, options: dict[str, object]) -> None:
    config, plain = small.model_config(**options), small.model_config()
    batch = small.batch(config)
    found = small.per_token(batch, forward_step(small.build(config, ranks), batch, small.OBJECTIVE, ranks))
    bf16 = small.per_token(batch, forward_step(small.build(plain, ranks), batch, small.OBJECTIVE, ranks))
    # e4m3 rounds by up to 2^-4; averaged over 512 terms per product, four layers and the tokens of a response.
    assert np.abs(found - bf16).mean() < 0.1
    assert not np.array_equal(found, bf16)


def test_the_layers_compute_in_fp8_and_the_head_does_not(ranks: Ranks, options: dict[str, object]) -> None:
    config = small.model_config(**options)
    parts = small.build(config, ranks)
    forward_step(parts, small.batch(config), small.OBJECTIVE, ranks)
    used = [module.fp8 for module in quantized_modules(parts)]
    per_layer = len(used) // 4
    edges = config.fp8_bf16_layers * per_layer
    assert used == [False] * edges + [True] * (len(used) - 2 * edges) + [False] * edges
    policy = unwrap(parts[0])
    assert policy.output_weight().dtype is torch.bfloat16
    assert not quantized_modules([policy.output_layer, policy.embedding])


def quantized_modules(model: Sequence[torch.nn.Module]) -> list[Any]:
    """Transformer Engine's linear modules: its only ones with an `fp8` switch."""
    return [module for part in model for module in part.modules() if hasattr(module, "fp8") and hasattr(module, "fp8_meta")]


def test_resumes_where_it_was(ranks: Ranks, options: dict[str, object], tmp_path: Path) -> None:
    config = small.model_config(**options)
    batch = small.batch(config)
    parts = small.build(config, ranks)
    reference = forward_step(parts, batch, small.OBJECTIVE, ranks)
    model, adam = small.wrap(parts, ranks)

    def step(model: list[torch.nn.Module], adam: object) -> torch.Tensor:
        optimizer.zero_gradients(model, adam)
        logps = fused_step(model, batch, reference, small.OBJECTIVE, ranks).policy.response
        optimizer.update(model, adam)
        return logps

    for _ in range(2):
        step(model, adam)
    (tmp_path / "megatron").mkdir()
    checkpoint.prepare_save(tmp_path, model, adam, ranks).execute_sync()
    expected = [step(model, adam) for _ in range(2)]
    resumed, again = small.wrap(small.build(config, ranks), ranks)
    checkpoint.load(tmp_path, resumed, again, ranks)
    found = [step(resumed, again) for _ in range(2)]
    assert torch.equal(found[0], expected[0])
    # Backward kernels may add in any order.
    torch.testing.assert_close(found[1], expected[1], rtol=0, atol=0.05)

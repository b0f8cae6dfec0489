"""On a GPU: adapters on local and Transformer Engine's layers, on FP8 and 4-bit base weights, against float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from mpo_megatron.config import LoraConfig
from mpo_megatron.families.adapters import choose_adapter
from mpo_megatron.model.adapters import adapters_off, clear_adapters
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import missing_for_recipe, missing_for_transformer_engine
from mpo_megatron.train.step import forward_step, fused_step
from tests.gpu import small

pytestmark = pytest.mark.gpu

ADAPTER = choose_adapter(small.family(), LoraConfig(rank=16))
VARIANTS: list[dict[str, Any]] = [
    {"backend": "local"},
    {"backend": "transformer_engine"},
    {"backend": "transformer_engine", "fp8": "current"},
]


@pytest.fixture(params=VARIANTS, ids=lambda options: "-".join(options.values()))
def options(request: pytest.FixtureRequest) -> dict[str, Any]:
    chosen: dict[str, Any] = request.param
    missing = missing_for_transformer_engine() if chosen["backend"] != "local" else None
    missing = missing or (missing_for_recipe(chosen["fp8"]) if "fp8" in chosen else None)
    if missing:
        pytest.skip(missing)
    return chosen


def test_switched_off_or_with_b_zero_it_is_the_base_model_to_the_last_bit(ranks: Ranks, options: dict[str, Any]) -> None:
    config = small.model_config(**options)
    batch = small.batch(config)
    base = forward_step(small.build(config, ranks), batch, small.OBJECTIVE, ranks).response
    parts = small.build(config, ranks, adapter=ADAPTER)
    assert not torch.equal(forward_step(parts, batch, small.OBJECTIVE, ranks).response, base)
    with adapters_off(parts):
        assert torch.equal(forward_step(parts, batch, small.OBJECTIVE, ranks).response, base)
    clear_adapters(parts)
    assert torch.equal(forward_step(parts, batch, small.OBJECTIVE, ranks).response, base)


def test_log_probs_and_gradients_are_near_float32(ranks: Ranks, options: dict[str, Any]) -> None:
    found = []
    for settings in ({"precision": "fp32", "backend": "local"}, options):
        config = small.model_config(**settings)
        batch = small.batch(config)
        parts = small.build(config, ranks, adapter=ADAPTER)
        with adapters_off(parts):
            reference = forward_step(parts, batch, small.OBJECTIVE, ranks)
        model, _ = small.wrap(parts, ranks)
        policy = fused_step(model, batch, reference, small.OBJECTIVE, ranks).policy
        trained = {name: item for name, item in small.plain_names(parts[0]).items() if item.requires_grad}
        assert all(".lora_" in name for name in trained)
        found.append((small.per_token(batch, policy), {name: item.main_grad.clone() for name, item in trained.items()}))
    (exact, expected), (logps, gradients) = found
    # Of log-probs near −7: bf16 has 8 bits, FP8 has 4.
    assert np.abs(logps - exact).max() <= (0.3 if "fp8" in options else 5e-2)
    assert expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(gradient.flatten().double(), expected[name].flatten().double(), dim=0)
        assert cosine > (0.9 if "fp8" in options else 0.99), (name, float(cosine))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_four_bits_are_those_of_the_cpu(dtype: torch.dtype) -> None:
    pytest.importorskip("bitsandbytes")
    from mpo_megatron.model.nf4 import quantize, rounded

    matrix = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)).to(dtype)
    blocks = quantize(matrix.cuda())
    found, expected = blocks.dequantize().cpu(), rounded(matrix)
    assert found.dtype is dtype
    different = found != expected
    assert different.float().mean() <= 1e-4  # a value between two levels may round to either
    assert torch.equal(rounded(matrix.cuda()).cpu(), found)

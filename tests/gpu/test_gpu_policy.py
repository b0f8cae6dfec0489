"""On a GPU: the policy with Transformer Engine's layers and every attention back end matches exact attention."""

from __future__ import annotations

import gc

import numpy as np
import pytest
import torch

from mpo_megatron.model.attention_backends import choose_attention
from mpo_megatron.model.attention_varlen import find_kernel
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import missing_for_transformer_engine
from mpo_megatron.train.resident import Resident
from mpo_megatron.train.step import forward_step, fused_step
from tests.gpu import small

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module")
def exact(ranks: Ranks) -> np.ndarray:
    """Log-probs of local layers in float32 with exact attention, by token."""
    config = small.model_config(precision="fp32", backend="local", attention="sdpa")
    batch = small.batch(config)
    return small.per_token(batch, forward_step(small.build(config, ranks), batch, small.OBJECTIVE, ranks))


def skip_without(backend: str, attention: str) -> None:
    missing = missing_for_transformer_engine() if backend == "transformer_engine" else None
    if missing:
        pytest.skip(missing)
    if attention == "varlen" and find_kernel() is None:
        pytest.skip("no variable-length kernel is installed")


# Log-probs of a token are near −7. Transformer Engine may run float32 products in TF32 (10 bits); bf16 has 8 bits.
@pytest.mark.parametrize(
    ("backend", "attention", "precision", "tolerance"),
    [
        ("transformer_engine", "sdpa", "fp32", 5e-3),
        ("local", "flex", "fp32", 5e-3),
        ("local", "sdpa", "bf16", 5e-2),
        ("local", "flex", "bf16", 5e-2),
        ("local", "varlen", "bf16", 5e-2),
        ("transformer_engine", "sdpa", "bf16", 5e-2),
        ("transformer_engine", "flex", "bf16", 5e-2),
        ("transformer_engine", "varlen", "bf16", 5e-2),
    ],
)
def test_log_probs(ranks: Ranks, exact: np.ndarray, backend: str, attention: str, precision: str, tolerance: float) -> None:
    skip_without(backend, attention)
    config = small.model_config(precision=precision, backend=backend, attention=attention)
    batch = small.batch(config)
    found = small.per_token(batch, forward_step(small.build(config, ranks), batch, small.OBJECTIVE, ranks))
    assert np.abs(found - exact).max() <= tolerance


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_gradients_with_recomputation(ranks: Ranks, recompute: str) -> None:
    """With the defaults: automatic layers and attention, in bf16, against float32."""
    found = []
    for options in ({"precision": "fp32", "backend": "local"}, {"precision": "bf16", "recompute": recompute}):
        config = small.model_config(**options)
        batch = small.batch(config)
        parts = small.build(config, ranks)
        reference = forward_step(small.build(config, ranks), batch, small.OBJECTIVE, ranks)
        model, _ = small.wrap(parts, ranks)
        fused_step(model, batch, reference, small.OBJECTIVE, ranks)
        found.append({name: parameter.main_grad.clone() for name, parameter in small.plain_names(parts[0]).items()})
    expected, gradients = found
    assert expected.keys() == gradients.keys()
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(gradient.flatten().double(), expected[name].flatten().double(), dim=0)
        assert cosine > 0.99, (name, float(cosine))


def test_a_bf16_run_starts_at_the_exact_loss(ranks: Ranks) -> None:
    config = small.model_config()
    assert choose_attention(config) in ("varlen", "flex")
    batch = small.batch(config)
    parts = small.build(config, ranks)
    reference = forward_step(parts, batch, small.OBJECTIVE, ranks)
    model, _ = small.wrap(parts, ranks)
    policy = fused_step(model, batch, reference, small.OBJECTIVE, ranks).policy
    # Attention kernels may sum in another order when they also save tensors for backward.
    assert small.mean_loss(batch, policy, reference) == pytest.approx(small.first_loss(batch), abs=1e-5)


def test_an_offloaded_reference_is_the_same(ranks: Ranks) -> None:
    config = small.model_config()
    batch = small.batch(config)
    parts = small.build(config, ranks)
    found = []
    for offload in (False, True):
        resident = Resident(small.build(config, ranks), offload=offload)
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        logps = forward_step(parts, batch, small.OBJECTIVE, ranks, resident)
        assert logps.kl is not None
        found.append((logps.kl, held))
        del resident
        gc.collect()  # modules refer to themselves
    assert torch.equal(found[0][0], found[1][0])
    weights = sum(parameter.numel() * parameter.element_size() for parameter in parts[0].parameters())
    output = 1024 * 512 * 2
    assert found[0][1] - found[1][1] >= 0.9 * (weights - output)

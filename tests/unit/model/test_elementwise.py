"""Elementwise parts of a layer against PyTorch's expressions, and their gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpo_megatron.model import elementwise
from mpo_megatron.model.elementwise import DERIVATIVES, Activation, gate, rms_norm, rotate

TOKENS = 7


def values(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, dtype=torch.float64, generator=generator).requires_grad_()


@pytest.mark.parametrize("rest", [0, 2])
def test_rotation(rest: int) -> None:
    """Also for strided queries, as a fused projection yields them; channels beyond the angles are unchanged."""
    angles = values(TOKENS, 1, 4).detach()
    cosines, sines = angles.cos(), angles.sin()
    x = values(TOKENS, 3, 2 * (8 + rest))[..., : 8 + rest]
    first, second, others = x.split([4, 4, rest], dim=-1)
    expected = torch.cat((first * cosines - second * sines, second * cosines + first * sines, others), dim=-1)
    torch.testing.assert_close(rotate(x, cosines, sines), expected)
    assert torch.autograd.gradcheck(lambda x: rotate(x, cosines, sines), x)


@pytest.mark.parametrize("activation", DERIVATIVES)
def test_gated_activation(activation: Activation) -> None:
    x = values(TOKENS, 1, 6)
    first, second = x.chunk(2, dim=-1)
    torch.testing.assert_close(gate(x, activation), activation(first) * second)
    assert torch.autograd.gradcheck(lambda x: gate(x, activation), x)


@pytest.mark.parametrize("block", [3, 256])
def test_rms_norm(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With more tokens than a block, and of a part of a wider tensor."""
    monkeypatch.setattr(elementwise, "BLOCK", block)
    x, weight = values(TOKENS, 1, 10)[..., :5], values(5)
    torch.testing.assert_close(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (5,), weight, 1e-6))
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 1e-3), (x, weight))


def test_rms_norm_of_bfloat16_is_pytorchs() -> None:
    x, weight = values(TOKENS, 4).to(torch.bfloat16), values(4).to(torch.bfloat16)
    assert torch.equal(rms_norm(x, weight, 1e-6), torch.nn.functional.rms_norm(x, (4,), weight, 1e-6))

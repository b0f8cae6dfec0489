"""The emulated recipes round as their definitions say."""

from __future__ import annotations

import pytest
import torch

from benchmarks.fp8_emulation import RECIPES, Product, round_blocks

E4M3 = torch.float8_e4m3fn


def test_a_block_is_rounded_under_its_own_power_of_two() -> None:
    torch.manual_seed(0)
    matrix = torch.randn(130, 300) * torch.exp(torch.randn(130, 300))
    rounded = round_blocks(matrix, E4M3, 1, 128)
    for row, start in ((0, 0), (129, 128), (57, 256)):
        block = matrix[row, start : start + 128]
        scale = 2.0 ** torch.floor(torch.log2(448 / block.abs().max()))
        assert torch.equal(rounded[row, start : start + 128], (block * scale).to(E4M3).float() / scale)
    louder = matrix.clone()
    louder[:, 128:256] *= 1000
    changed = round_blocks(louder, E4M3, 1, 128)
    assert torch.equal(changed[:, :128], rounded[:, :128])
    assert torch.equal(changed[:, 256:], rounded[:, 256:])


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_near_and_not_equal(recipe: str) -> None:
    torch.manual_seed(0)
    inputs, weight, gradient = torch.randn(48, 160), torch.randn(96, 160), torch.randn(48, 96)
    found, expected = [], []
    for product, into in ((lambda x, w: Product.apply(x, w, recipe), found), (torch.nn.functional.linear, expected)):
        leaves = [inputs.clone().requires_grad_(), weight.clone().requires_grad_()]
        output = product(*leaves)
        into += [output.detach(), *torch.autograd.grad(output, leaves, gradient)]
    for ours, exact in zip(found, expected, strict=True):
        # e4m3 errs by up to 2^-4 of a number, e5m2 by 2^-3; products of two, errors of random sign.
        assert 0.005 < (ours - exact).norm() / exact.norm() < 0.1

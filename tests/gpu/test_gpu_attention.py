"""On a GPU: every attention back end equals exact attention, gradients included, in memory that is not quadratic in the row."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mpo_megatron.model.attention import RowLayout, row_layout, segment_attention
from mpo_megatron.model.attention_flex import build_block_mask, flex_row_attention
from mpo_megatron.model.attention_varlen import find_kernel, varlen_row_attention
from tests.unit.model.rows import random_groups_row, random_qkv

pytestmark = pytest.mark.gpu

# bf16 rounds by 2^-9; outputs are averages of values near 1, gradients sums of a few dozen such terms.
TOLERANCE = 2e-2


@pytest.fixture(params=["flex", "varlen"])
def attend(request: pytest.FixtureRequest) -> Callable[[Tensor, Tensor, Tensor, RowLayout], Tensor]:
    if request.param == "flex":
        return flex_row_attention
    if find_kernel() is None:
        pytest.skip("no variable-length kernel is installed")
    return varlen_row_attention


def outputs_and_gradients(output: Tensor, inputs: list[Tensor], weights: Tensor) -> list[Tensor]:
    return [output, *torch.autograd.grad((output * weights.to(output.dtype)).sum(), inputs)]


@pytest.mark.parametrize(("heads", "groups"), [(8, 8), (8, 2)])
def test_equals_exact_attention(attend: Callable[..., Tensor], heads: int, groups: int) -> None:
    for seed in range(6):
        segments = random_groups_row(seed, max_tokens=200)
        exact_inputs = random_qkv(segments[-1].end, heads, groups, channels=64, device="cuda")
        inputs = [part.detach().bfloat16().requires_grad_() for part in exact_inputs]
        exact_inputs = [part.detach().double().requires_grad_() for part in inputs]  # the same rounded numbers
        weights = torch.randn(segments[-1].end, heads, 64, device="cuda")
        ours = outputs_and_gradients(attend(*inputs, row_layout(segments)), inputs, weights)
        exact = outputs_and_gradients(segment_attention(*exact_inputs, segments), exact_inputs, weights)
        for left, right in zip(ours, exact, strict=True):
            assert (left.double() - right).abs().max() <= TOLERANCE * right.abs().max()


@pytest.mark.parametrize(("context", "length"), [(1, 200), (200, 1), (7, 7), (300, 129), (129, 300)])
def test_causal_mask_is_aligned_at_the_bottom_right(attend: Callable[..., Tensor], context: int, length: int) -> None:
    """A response's first token attends to its whole prompt and itself, its last one to everything."""
    segments = row_layout([(0, context, 0, 0), (context, context + length, 0, context)])
    query, key, _ = (part.detach() for part in random_qkv(context + length, 2, 2, channels=64, device="cuda"))
    # Values that reveal the attended keys: the mean of 0 … n − 1 under uniform weights.
    positions = torch.arange(context + length, device="cuda", dtype=torch.float32) / 512
    value = positions[:, None, None].expand_as(key).contiguous()
    output = attend((0 * query).bfloat16(), key.bfloat16(), value.bfloat16(), segments)
    expected = positions / 2  # token t attends to 0 … t: prompt and response are consecutive
    assert (output[:, 0, 0].float() - expected).abs().max() <= 2**-8


def test_flex_in_float32() -> None:
    segments = random_groups_row(3, max_tokens=200)
    inputs = random_qkv(segments[-1].end, 8, 2, channels=64, dtype=torch.float32, device="cuda")
    weights = torch.randn(segments[-1].end, 8, 64, device="cuda")
    ours = outputs_and_gradients(flex_row_attention(*inputs, row_layout(segments)), list(inputs), weights)
    doubles = [part.detach().double().requires_grad_() for part in inputs]
    exact = outputs_and_gradients(segment_attention(*doubles, segments), doubles, weights)
    for left, right in zip(ours, exact, strict=True):
        assert (left.double() - right).abs().max() <= 5e-3 * right.abs().max()  # its products may run in TF32


def test_siblings_do_not_matter(attend: Callable[..., Tensor]) -> None:
    segments = row_layout([(0, 500, 0, 0), (500, 700, 0, 500), (700, 960, 0, 500)])
    inputs = [part.detach() for part in random_qkv(960, 4, 2, channels=64, dtype=torch.bfloat16, device="cuda")]
    before = attend(*inputs, segments)
    for part in inputs:
        part[500:700] += 1
    after = attend(*inputs, row_layout(segments.segments))
    torch.testing.assert_close(before[700:], after[700:], rtol=0, atol=1e-3)
    torch.testing.assert_close(before[:500], after[:500], rtol=0, atol=1e-3)


def test_flex_mask_of_a_long_row_is_small() -> None:
    """A mask of 65536² entries would take 4 GiB; intervals take a few integers per token and block."""
    prompt, response = 2048, 512
    size = prompt + 12 * response
    segments = []
    for start in range(0, 65536 - size + 1, size):
        end = start + prompt
        segments.append((start, end, start, start))
        segments += [(end + k * response, end + (k + 1) * response, start, end) for k in range(12)]
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    layout = row_layout(segments)
    layout.index(build_block_mask)
    assert torch.cuda.memory_allocated() - before < 32 * 2**20
    assert torch.cuda.max_memory_allocated() - before < 2**30


def test_sdpa_runs_in_bf16() -> None:
    segments = random_groups_row(1, max_tokens=200)
    inputs = random_qkv(segments[-1].end, 8, 2, channels=64, dtype=torch.bfloat16, device="cuda")
    segment_attention(*inputs, segments).float().sum().backward()
    assert all(part.grad is not None and part.grad.isfinite().all() for part in inputs)

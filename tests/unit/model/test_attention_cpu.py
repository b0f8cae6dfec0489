"""Attention by blocks equals attention by segments, and its blocks hold every attended pair once."""

from __future__ import annotations

import pytest
import torch

from mpo_megatron.model import attention_cpu
from mpo_megatron.model.attention import PLAIN, ScoreSettings, Segment, row_layout, segment_attention
from mpo_megatron.model.attention_cpu import cpu_row_attention, split_blocks
from tests.unit.model.rows import assert_same, random_groups_row, random_qkv, visible_pairs

SCORES = (
    PLAIN,
    ScoreSettings(scale=0.3),
    *(ScoreSettings(window=window) for window in (1, 5, 30)),
    ScoreSettings(cap=0.5),
    ScoreSettings(cap=0.5, window=5, scale=0.3),
)


@pytest.fixture(autouse=True, params=[1, 5, 128], ids="square {}".format)
def square(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Causal squares of one token, squares shorter than most segments, and squares that no segment exceeds."""
    monkeypatch.setattr(attention_cpu, "SQUARE", request.param)


@pytest.mark.parametrize("window", [None, 1, 2, 7, 30, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_every_pair_is_in_one_block(seed: int, window: int | None) -> None:
    segments = random_groups_row(seed)
    counts = torch.zeros(segments[-1].end, segments[-1].end, dtype=torch.int)
    blocks = split_blocks(tuple(segments), window)
    for block in blocks:
        own = counts[block.start : block.end, block.key_start : block.key_end]
        seen = torch.ones_like(own).tril() if block.causal else torch.ones_like(own)
        if block.edge is not None:
            seen = seen.triu(-block.edge)
            assert seen.any(dim=-1).all()  # the kernel divides by a query's sum
        own += seen
    assert torch.equal(counts, visible_pairs(segments, window).int())
    covered = [token for block in blocks if block.causal for token in range(block.start, block.end)]
    assert sorted(covered) == list(range(segments[-1].end))


def test_all_responses_attend_to_their_prompt_in_one_block() -> None:
    """Also responses longer than a causal square, all of whose squares but the last are full."""
    prompt, first, second = Segment(0, 50, 0, 0), Segment(50, 250, 0, 50), Segment(250, 700, 0, 50)
    blocks = split_blocks((prompt, first, second))
    assert [block for block in blocks if not block.causal and block.key_end == 50] == [(50, 700, 0, 50, False, None)]
    sizes = [block.end - block.start for block in blocks if block.causal]
    assert sum(size != attention_cpu.SQUARE for size in sizes) <= 3
    assert max(sizes) <= attention_cpu.SQUARE


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (6, 2)])
@pytest.mark.parametrize("scores", SCORES, ids=str)
def test_equals_attention_by_segments(seed: int, heads: int, groups: int, scores: ScoreSettings) -> None:
    segments = random_groups_row(seed)
    inputs = random_qkv(segments[-1].end, heads, groups)
    ours = cpu_row_attention(*inputs, row_layout(segments), scores)
    exact = segment_attention(*inputs, segments, scores)
    assert_same(ours, exact, inputs)


def test_bf16_is_rounded_once_a_block() -> None:
    """Parts are merged, and gradients summed, in float32: what is left is each block's own rounding."""
    segments = random_groups_row(1, max_groups=2)
    inputs = random_qkv(segments[-1].end, 4, 2, dtype=torch.bfloat16)
    doubles = [part.detach().double().requires_grad_() for part in inputs]
    ours = cpu_row_attention(*inputs, row_layout(segments))
    exact = segment_attention(*doubles, segments)
    num_blocks = len(split_blocks(tuple(segments)))
    precision = torch.finfo(torch.bfloat16).eps
    torch.testing.assert_close(ours.double(), exact, rtol=0, atol=2 * precision * float(exact.detach().abs().max()))
    weights = torch.randn_like(exact).bfloat16()
    for left, right in zip(
        torch.autograd.grad(ours, inputs, weights), torch.autograd.grad(exact, doubles, weights.double()), strict=True
    ):
        torch.testing.assert_close(left.double(), right, rtol=0, atol=num_blocks**0.5 * precision * float(right.abs().max()))


def test_strides_do_not_matter() -> None:
    """Queries, keys and values are views of one projection, and a gradient may be expanded."""
    segments = random_groups_row(2)
    projected = torch.randn(segments[-1].end, 2, 4 * 8, dtype=torch.float64, requires_grad=True)
    query, key, value = (part.reshape(len(part), -1, 8) for part in projected.split([16, 8, 8], dim=-1))
    copies = [part.detach().clone().requires_grad_() for part in (query, key, value)]
    cpu_row_attention(query, key, value, row_layout(segments)).sum().backward()
    cpu_row_attention(*copies, row_layout(segments)).sum().backward()
    grads = [part.grad.view(len(part), 2, -1) for part in copies if part.grad is not None]
    torch.testing.assert_close(projected.grad, torch.cat(grads, dim=-1))

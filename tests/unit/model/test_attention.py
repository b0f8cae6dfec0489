"""Attention over a packed row equals attention with an explicit mask, and attends to nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mpo_megatron.model.attention import PLAIN, ScoreSettings, Segment, row_layout, segment_attention
from tests.unit.model.rows import visible_pairs


def dense_attention(query: Tensor, key: Tensor, value: Tensor, segments: list[Segment], scores: ScoreSettings) -> Tensor:
    """softmax(q·kᵀ/√D)·v with a boolean mask over the whole row, heads repeated by hand."""
    _, heads, channels = query.shape
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    products = torch.einsum("qhd,khd->hqk", query, key) * (scores.scale or 1 / math.sqrt(channels))
    if scores.cap is not None:
        products = scores.cap * torch.tanh(products / scores.cap)
    visible = visible_pairs(segments, scores.window)
    weights = products.masked_fill(~visible, float("-inf")).softmax(dim=-1)
    return torch.einsum("hqk,khd->qhd", weights, value)


def random_row(seed: int) -> list[Segment]:
    """Up to four groups of up to five responses, some of one token."""
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    segments, end = [], 0
    for _ in range(draw(1, 4)):
        prompt = (end, end + draw(1, 9))
        segments.append(Segment(*prompt, prompt[0], prompt[0]))
        end = prompt[1]
        for _ in range(draw(0, 5)):
            length = draw(1, 7)
            segments.append(Segment(end, end + length, *prompt))
            end += length
    return segments


def random_inputs(num_tokens: int, heads: int, groups: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(num_tokens, heads, 8), (num_tokens, groups, 8), (num_tokens, groups, 8)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64, requires_grad=True) for shape in shapes]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "scores", [PLAIN, ScoreSettings(window=4), ScoreSettings(window=1), ScoreSettings(window=7, scale=0.2, cap=0.5)], ids=str
)
def test_equals_dense_attention(seed: int, heads: int, groups: int, scores: ScoreSettings) -> None:
    segments = random_row(seed)
    inputs = random_inputs(segments[-1].end, heads, groups)
    ours, dense = segment_attention(*inputs, segments, scores), dense_attention(*inputs, segments, scores)
    torch.testing.assert_close(ours, dense)
    weights = torch.randn_like(dense)
    for left, right in zip(
        torch.autograd.grad((ours * weights).sum(), inputs), torch.autograd.grad((dense * weights).sum(), inputs), strict=True
    ):
        torch.testing.assert_close(left, right)


def test_siblings_and_neighbours_do_not_matter() -> None:
    segments = [Segment(0, 5, 0, 0), Segment(5, 9, 0, 5), Segment(9, 12, 0, 5), Segment(12, 15, 12, 12), Segment(15, 18, 12, 15)]
    inputs = random_inputs(18, 4, 2)
    before = segment_attention(*inputs, segments)
    changed = [part.detach().clone() for part in inputs]
    for part in changed:
        part[5:9] += 1
        part[12:] += 1
    after = segment_attention(*changed, segments)
    assert torch.equal(before[:5], after[:5])
    assert torch.equal(before[9:12], after[9:12])
    assert not torch.equal(before[5:9], after[5:9])


def test_row_layout_takes_array_rows() -> None:
    layout = row_layout(torch.tensor([[0, 3, 0, 0], [3, 5, 0, 3]]).numpy())
    assert layout.segments == (Segment(0, 3, 0, 0), Segment(3, 5, 0, 3))
    assert layout.qkv_format == "sbhd"

"""Attention over a packed row equals attention with an explicit mask, and attends to nothing else."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from mpo_megatron.model.attention import PLAIN, ScoreSettings, Segment, row_layout, segment_attention
from tests.unit.model.rows import assert_same, random_groups_row, random_qkv, visible_pairs


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


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(
    "scores", [PLAIN, ScoreSettings(window=4), ScoreSettings(window=1), ScoreSettings(window=7, scale=0.2, cap=0.5)], ids=str
)
def test_equals_dense_attention(seed: int, heads: int, groups: int, scores: ScoreSettings) -> None:
    segments = random_groups_row(seed, max_responses=5, max_tokens=9)
    inputs = random_qkv(segments[-1].end, heads, groups)
    assert_same(segment_attention(*inputs, segments, scores), dense_attention(*inputs, segments, scores), inputs)


def test_siblings_and_neighbours_do_not_matter() -> None:
    segments = [Segment(0, 5, 0, 0), Segment(5, 9, 0, 5), Segment(9, 12, 0, 5), Segment(12, 15, 12, 12), Segment(15, 18, 12, 15)]
    inputs = random_qkv(18, 4, 2)
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

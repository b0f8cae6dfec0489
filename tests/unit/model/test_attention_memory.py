"""Attention on a CPU makes no tensor that grows with the square of a row's tokens."""

from __future__ import annotations

import pytest
import torch

from mpo_megatron.model.attention import PLAIN, ScoreSettings, row_layout
from mpo_megatron.model.attention_cpu import SQUARE, cpu_row_attention
from tests.largest_tensor import LargestTensor


@pytest.mark.parametrize("scores", [PLAIN, ScoreSettings(window=256), ScoreSettings(cap=0.5)], ids=str)
def test_memory_is_linear_in_tokens(scores: ScoreSettings) -> None:
    length = 4096
    query, key, value = (torch.randn(length, 1, 8, requires_grad=True) for _ in range(3))
    with LargestTensor() as largest:
        cpu_row_attention(query, key, value, row_layout([(0, length, 0, 0)]), scores).sum().backward()
    assert 8 * length <= largest.elements <= SQUARE * length

"""Random packed rows for tests of attention, and a kernel for them."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from mpo_megatron.model.attention import ScoreSettings, Segment
from mpo_megatron.model.attention_varlen import VarlenIndex


def random_groups_row(seed: int, *, max_groups: int = 4, max_responses: int = 16, max_tokens: int = 30) -> list[Segment]:
    """Groups of up to `max_responses` responses, many of one token, then padding; prompts and responses up to `max_tokens`."""
    rng = np.random.default_rng(seed)
    segments: list[Segment] = []
    end = 0
    for _ in range(rng.integers(1, max_groups, endpoint=True)):
        prompt = (end, end + int(rng.integers(1, max_tokens, endpoint=True)))
        segments.append(Segment(*prompt, prompt[0], prompt[0]))
        end = prompt[1]
        for _ in range(rng.integers(0, max_responses, endpoint=True)):
            length = 1 if rng.random() < 0.3 else int(rng.integers(1, max_tokens, endpoint=True))
            segments.append(Segment(end, end + length, *prompt))
            end += length
    padding = -end % 16
    if padding:
        segments.append(Segment(end, end + padding, end, end))
    return segments


def visible_pairs(segments: list[Segment], window: int | None = None) -> Tensor:
    """[T, T] the keys that each query attends to, computed directly."""
    visible = torch.zeros(segments[-1].end, segments[-1].end, dtype=torch.bool)
    for segment in segments:
        for token in range(segment.start, segment.end):
            seen = [*range(segment.context_start, segment.context_end), *range(segment.start, token + 1)]
            visible[token, seen[-(window or len(seen)) :]] = True
    return visible


def random_qkv(
    num_tokens: int, heads: int, groups: int, *, channels: int = 8, dtype: torch.dtype = torch.float64, device: str = "cpu"
) -> list[Tensor]:
    """Query [T, heads, channels], key and value [T, groups, channels], all requiring gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(num_tokens, heads, channels), (num_tokens, groups, channels), (num_tokens, groups, channels)]
    drawn = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [tensor.to(device, dtype).requires_grad_() for tensor in drawn]


def assert_same(ours: Tensor, exact: Tensor, inputs: list[Tensor]) -> None:
    """Two computations from the same inputs have the same result, and the same gradients of it, weighted at random."""
    torch.testing.assert_close(ours, exact)
    weights = torch.randn_like(exact)
    gradients = (torch.autograd.grad((output * weights).sum(), inputs) for output in (ours, exact))
    for left, right in zip(*gradients, strict=True):
        torch.testing.assert_close(left, right)


def plain_varlen_kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scores: ScoreSettings) -> Tensor:
    """A variable-length flash kernel in plain operations: causal, aligned at the bottom right."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    outputs = []
    for number in range(len(index.query_ends) - 1):
        queries = slice(int(index.query_ends[number]), int(index.query_ends[number + 1]))
        keys = slice(int(index.key_ends[number]), int(index.key_ends[number + 1]))
        num_queries, num_keys = queries.stop - queries.start, keys.stop - keys.start
        assert 0 < num_queries <= index.max_queries
        assert 0 < num_keys <= index.max_keys
        hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(num_keys - num_queries + 1)
        if scores.window is not None:
            hidden |= torch.ones(num_queries, num_keys, dtype=torch.bool).tril(num_keys - num_queries - scores.window)
        products = torch.einsum("qhd,khd->hqk", query[queries], key[keys]) * (scores.scale or 1 / math.sqrt(query.shape[2]))
        if scores.cap is not None:
            products = scores.cap * torch.tanh(products / scores.cap)
        outputs.append(torch.einsum("hqk,khd->qhd", products.masked_fill(hidden, float("-inf")).softmax(dim=-1), value[keys]))
    return torch.cat(outputs)

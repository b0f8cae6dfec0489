"""Attention over a packed row on a CPU, in few and dense calls of PyTorch's flash kernel.

The kernel computes the masked half of a causal square, and all pairs of a mask: calls with neither are twice as fast a pair.
So a group's responses attend to their prompt in one call, and a causal square is halved into two smaller ones and a dense
block, until what is left is small. A token's parts are merged by their normalizers, as flash attention merges blocks. Backward
needs no parts: with a token's final output and normalizer, the kernel's gradient of each block is that of the whole softmax.

Legend: T tokens of the row, A attention heads, Q key/value heads, D channels; q, k tokens of one call.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpo_megatron.model.attention import PLAIN, RowLayout, ScoreSettings, Segment, heads_first, segment_attention

SQUARE = 128
"""Longest causal square that is not halved: below, the kernel's own blocks of queries become too small."""

FORWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class AttentionBlock(NamedTuple):
    """Queries of tokens [start, end) with keys of tokens [key_start, key_end)."""

    start: int
    end: int
    key_start: int
    key_end: int
    causal: bool
    """Queries and keys are the same tokens, and a token attends to none after it."""


def cpu_row_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: ScoreSettings = PLAIN) -> Tensor:
    """Attention within a row: by blocks where scores are plain, by segments with a window or a cap."""
    if scores.window is not None or scores.cap is not None:
        return segment_attention(query, key, value, layout.segments, scores)
    attended: Tensor = _BlockAttention.apply(query, key, value, layout.index(split_blocks), scores.scale)
    return attended


def split_blocks(segments: tuple[Segment, ...], window: int | None = None) -> list[AttentionBlock]:
    """Blocks that hold each attended pair once; there is no window. First come causal blocks, one for each token."""
    causal, dense = [], []
    waiting = [(segment.start, segment.end) for segment in segments]
    while waiting:
        start, end = waiting.pop()
        if end - start <= SQUARE:
            causal.append(AttentionBlock(start, end, start, end, causal=True))
            continue
        middle = (start + end) // 2
        waiting += [(start, middle), (middle, end)]
        dense.append(AttentionBlock(middle, end, start, middle, causal=False))
    for segment in segments:
        context = segment.context_start, segment.context_end
        if context[0] == context[1]:
            continue
        if dense and (dense[-1].end, *dense[-1][2:4]) == (segment.start, *context):  # responses of one group
            dense[-1] = dense[-1]._replace(end=segment.end)
        else:
            dense.append(AttentionBlock(segment.start, segment.end, *context, causal=False))
    return causal + dense


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[AttentionBlock], scale: float | None) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        output, normalizer = query.new_empty(query.shape, dtype=exact), query.new_empty(query.shape[:2], dtype=exact)
        for block in blocks:
            inputs = (heads_first(part) for part in _parts(block, query, key, value))
            part, part_normalizer = FORWARD(*inputs, 0.0, block.causal, scale=scale)
            part, part_normalizer = part[0].transpose(0, 1), part_normalizer[0].T
            rows = slice(block.start, block.end)
            if block.causal:  # the first of these tokens' blocks
                output[rows], normalizer[rows] = part, part_normalizer
                continue
            share = torch.sigmoid(part_normalizer - normalizer[rows])
            output[rows].lerp_(part.to(exact), share[:, :, None])
            torch.logaddexp(normalizer[rows], part_normalizer, out=normalizer[rows])
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, normalizer)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normalizer = ctx.saved_tensors
        grads = [part.new_zeros(part.shape, dtype=normalizer.dtype) for part in (query, key, value)]
        for block in ctx.blocks:
            rows = slice(block.start, block.end)
            inputs = (heads_first(part) for part in (grad[rows], *_parts(block, query, key, value), output[rows]))
            parts = BACKWARD(*inputs, normalizer[rows].T[None], 0.0, block.causal, scale=ctx.scale)
            for total, part in zip(_parts(block, *grads), parts, strict=True):
                total += part[0].transpose(0, 1)
        return (*(part.to(query.dtype) for part in grads), None, None)


def _parts(block: AttentionBlock, query: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[q, A, D], [k, Q, D], [k, Q, D] of one block."""
    keys = slice(block.key_start, block.key_end)
    return query[block.start : block.end], key[keys], value[keys]

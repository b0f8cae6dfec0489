"""Attention over a packed row on a CPU, in few and dense calls of PyTorch's flash kernel.

The kernel computes the masked half of a causal square, and all pairs of a mask: calls with neither are twice as fast a pair.
So a group's responses attend to their prompt in one call, and a causal square is divided into two smaller ones and a dense
block, until what is left is small. A token's parts are merged by their normalizers, as flash attention merges blocks. Backward
needs no parts: with a token's final output and normalizer, the kernel's gradient of each block is that of the whole softmax.

A window adds a small masked block for each few queries, those of its far edge. The kernel cannot cap scores: they are computed
from products, for a few queries at a time, and again in backward. So memory is linear in the tokens of a row in every case.

Legend: T tokens of the row, A attention heads, Q key/value heads, D channels; q, k tokens of one call.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from mpo_megatron.model.attention import PLAIN, RowLayout, ScoreSettings, Segment, attend, heads_first

SQUARE = 128
"""Longest causal square that is not divided: below, the kernel's own blocks of queries become too small. Also the number of
queries computed together with a window or a cap."""

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
    edge: int | None = None
    """A window's far edge: query i of the block attends to its keys from i − edge on. None: to all."""


def cpu_row_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: ScoreSettings = PLAIN) -> Tensor:
    """Attention within a row: by blocks, or a few queries at a time where scores are capped."""
    attended: Tensor
    if scores.cap is not None:
        attended = _CappedAttention.apply(query, key, value, layout.segments, scores)
    else:
        blocks = layout.index(split_blocks, scores.window)
        attended = _BlockAttention.apply(query, key, value, blocks, scores.scale)
    return attended


def split_blocks(segments: tuple[Segment, ...], window: int | None = None) -> list[AttentionBlock]:
    """Blocks that hold each attended pair once. First come causal blocks, one for each token."""
    causal, dense, contexts = list[AttentionBlock](), list[AttentionBlock](), list[AttentionBlock]()
    for segment in segments:
        context = segment.context_start, segment.context_end
        if window is not None and context[1] - context[0] + segment.end - segment.start > window:
            for block in split_window(segment, window):
                (causal if block.causal else dense).append(block)
            continue
        waiting = [(segment.start, segment.end)]
        while waiting:
            start, end = waiting.pop()
            if end - start <= SQUARE:
                causal.append(AttentionBlock(start, end, start, end, causal=True))
                continue
            # All squares but the last are full: the kernel is slow at odd sizes.
            middle = start + (SQUARE << ((end - start - 1) // SQUARE).bit_length() - 1)
            waiting += [(start, middle), (middle, end)]
            dense.append(AttentionBlock(middle, end, start, middle, causal=False))
        if context[0] == context[1]:
            continue
        last = contexts[-1] if contexts else None
        if last is not None and (last.end, last.key_start, last.key_end) == (segment.start, *context):
            contexts[-1] = last._replace(end=segment.end)  # responses of one group
        else:
            contexts.append(AttentionBlock(segment.start, segment.end, *context, causal=False))
    return causal + dense + contexts


def split_window(segment: Segment, window: int) -> Iterator[AttentionBlock]:
    """The blocks of a segment whose tokens, with its context, are more than the window.

    Tokens count from the context's first. Queries [start, end) all see the keys from end − window on; the one `i` further than
    `start` also sees the earlier ones from start + i + 1 − window on.
    """
    num_context = segment.context_end - segment.context_start
    for start, end in _split_queries(segment, window):
        rows = segment.start + start - num_context, segment.start + end - num_context
        yield AttentionBlock(*rows, *rows, causal=True)
        oldest = start + 1 - window
        for keys in _split_keys(segment, max(end - window, 0), start):
            yield AttentionBlock(*rows, *keys.tokens, causal=False)
        for keys in _split_keys(segment, max(oldest, 0), end - window):
            last = min(end, keys.end + window - 1)  # later queries see none of these keys
            yield AttentionBlock(rows[0], rows[0] + last - start, *keys.tokens, causal=False, edge=keys.start - oldest)


class _Keys(NamedTuple):
    start: int
    """Counted from the context's first token."""
    end: int
    tokens: tuple[int, int]
    """First and last + 1 in the row."""


def _split_queries(segment: Segment, window: int | None) -> Iterator[tuple[int, int]]:
    """The segment's tokens, a few at a time, counted from the context's first."""
    first = segment.context_end - segment.context_start
    stop = first + segment.end - segment.start
    step = SQUARE if window is None else min(SQUARE, window)
    yield from ((start, min(start + step, stop)) for start in range(first, stop, step))


def _split_keys(segment: Segment, start: int, end: int) -> Iterator[_Keys]:
    """Keys [start, end), counted from the context's first token: those of the context, and those of the segment."""
    num_context = segment.context_end - segment.context_start
    for low, high, offset in (
        (start, min(end, num_context), segment.context_start),
        (max(start, num_context), end, segment.start - num_context),
    ):
        if low < high:
            yield _Keys(low, high, (low + offset, high + offset))


class _BlockAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, blocks: list[AttentionBlock], scale: float | None) -> Tensor:
        exact = torch.promote_types(query.dtype, torch.float32)
        output = query.new_empty(query.shape, dtype=exact)
        normalizers = query.new_empty((1, query.shape[1], query.shape[0]), dtype=exact)
        queries, keys, values, outputs = (heads_first(part) for part in (query, key, value, output))
        for block in blocks:
            rows, seen = _tokens(block)
            mask = _edge_mask(block, query)
            inputs = queries[:, :, rows], keys[:, :, seen], values[:, :, seen]
            part, own = FORWARD(*inputs, 0.0, block.causal, attn_mask=mask, scale=scale)
            total, normalizer = outputs[:, :, rows], normalizers[:, :, rows]
            if block.causal:  # the first of these tokens' blocks
                total.copy_(part)
                normalizer.copy_(own)
                continue
            share = torch.sigmoid(own - normalizer)
            total.lerp_(part.to(exact), share[..., None])
            torch.logaddexp(normalizer, own, out=normalizer)
        output = output.to(query.dtype)
        ctx.save_for_backward(query, key, value, output, normalizers)
        ctx.blocks, ctx.scale = blocks, scale
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, normalizers = ctx.saved_tensors
        grads = [part.new_empty(part.shape, dtype=normalizers.dtype) for part in (query, key, value)]
        queries, keys, values, outputs, gradients = (heads_first(part) for part in (query, key, value, output, grad))
        totals = [heads_first(part) for part in grads]
        for block in ctx.blocks:
            rows, seen = _tokens(block)
            mask = _edge_mask(block, query)
            inputs = gradients[:, :, rows], queries[:, :, rows], keys[:, :, seen], values[:, :, seen], outputs[:, :, rows]
            parts = BACKWARD(*inputs, normalizers[:, :, rows], 0.0, block.causal, attn_mask=mask, scale=ctx.scale)
            for total, part, tokens in zip(totals, parts, (rows, seen, seen), strict=True):
                if block.causal:  # the first of these tokens' blocks, as queries and as keys
                    total[:, :, tokens] = part
                else:
                    total[:, :, tokens].add_(part)
        return (*(part.to(query.dtype) for part in grads), None, None)


def _tokens(block: AttentionBlock) -> tuple[slice, slice]:
    """The block's queries and keys."""
    return slice(block.start, block.end), slice(block.key_start, block.key_end)


def _edge_mask(block: AttentionBlock, like: Tensor) -> Tensor | None:
    """[q, k] 0 where a query of a window's far edge attends to a key, −∞ elsewhere."""
    if block.edge is None:
        return None
    mask = like.new_full((block.end - block.start, block.key_end - block.key_start), -torch.inf)
    return mask.tril(-block.edge - 1)


class _CappedAttention(torch.autograd.Function):
    """Keeps queries, keys and values only; scores of a few queries exist at a time, and again in backward."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scores: ScoreSettings
    ) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.segments, ctx.scores = segments, scores
        output = torch.empty_like(query)
        for rows, keys in _visible(segments, scores.window):
            output[rows] = attend(query[rows], _gather(key, keys), _gather(value, keys), scores)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        exact = torch.promote_types(grad.dtype, torch.float32)
        grads = [torch.zeros_like(part, dtype=exact) for part in ctx.saved_tensors]
        query, key, value = (part.detach() for part in ctx.saved_tensors)
        for rows, keys in _visible(ctx.segments, ctx.scores.window):
            inputs = [part.requires_grad_() for part in (query[rows], _gather(key, keys), _gather(value, keys))]
            with torch.enable_grad():
                output = attend(inputs[0], inputs[1], inputs[2], ctx.scores)
            parts = torch.autograd.grad(output, inputs, grad[rows])
            grads[0][rows] += parts[0]
            for total, part in zip(grads[1:], parts[1:], strict=True):
                for span, piece in zip(keys, part.split([span.stop - span.start for span in keys]), strict=True):
                    total[span] += piece
        return (*(part.to(query.dtype) for part in grads), None, None)


def _gather(values: Tensor, spans: Sequence[slice]) -> Tensor:
    return torch.cat([values[span] for span in spans])


def _visible(segments: Sequence[Segment], window: int | None) -> Iterator[tuple[slice, list[slice]]]:
    """A few tokens of the row at a time, and all that the first or a later one of them attends to, theirs last."""
    for segment in segments:
        num_context = segment.context_end - segment.context_start
        for start, end in _split_queries(segment, window):
            oldest = 0 if window is None else max(start + 1 - window, 0)
            rows = slice(segment.start + start - num_context, segment.start + end - num_context)
            yield rows, [slice(*keys.tokens) for keys in _split_keys(segment, oldest, end)]

"""`flex`: PyTorch's compiled flex attention, which skips blocks of the score matrix without attended pairs.

Each row keeps a list of blocks, (T / 128)² small integers, and three integers per token: never a mask of T² entries.
Legend as in attention.py; B tokens per block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from mpo_megatron import device
from mpo_megatron.model.attention import PLAIN, RowLayout, ScoreSettings, Segment, heads_first

BLOCK = 128
"""B: tokens per block, the unit that the kernel skips."""
KERNEL_OPTIONS = {"FORCE_USE_FLEX_ATTENTION": True}
"""Disable the decoding kernel, which rows shorter than a block would get: it fails with varying lengths."""


def flex_row_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: ScoreSettings = PLAIN) -> Tensor:
    """Attention [T, A, D] of query [T, A, D] over key and value [T, Q, D] in a row of this layout."""
    mask = layout.index(build_block_mask, scores.window)
    options: dict[str, Any] = {} if scores.scale is None else {"scale": scores.scale}
    if scores.cap is not None:
        options["score_mod"] = _cap(scores.cap)
    parts = (heads_first(part) for part in (query, key, value))
    output = _compiled()(*parts, block_mask=mask, enable_gqa=True, kernel_options=KERNEL_OPTIONS, **options)
    return output.squeeze(0).transpose(0, 1)


@functools.cache
def _cap(cap: float) -> Callable[..., Tensor]:
    """The score modification that caps: one function per cap, so that nothing is compiled twice."""

    def modify(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return cap * torch.tanh(score / cap)

    return modify


@functools.cache
def _compiled() -> Callable[..., Tensor]:
    return device.compile_for_any_length(flex_attention)


def build_block_mask(segments: Sequence[Segment], window: int | None = None) -> BlockMask:
    """The blocks of the row's scores to compute, and those among them that need no mask inside.

    torch's own `create_block_mask` would create all T² entries first; counting intervals gives the same result.
    """
    edges = torch.tensor(segments, dtype=torch.int32)
    per_token = device.upload(edges.repeat_interleave(edges[:, 1] - edges[:, 0], dim=0))
    start, _, context_start, context_end = (column.contiguous() for column in per_token.unbind(dim=1))
    num_tokens = len(start)
    token = torch.arange(num_tokens, dtype=torch.int32, device=start.device)
    if window is not None:  # a response continues the prompt's positions
        context_start = torch.maximum(context_start, context_end + (token - start) - (window - 1))
        start = torch.maximum(start, token - (window - 1))
    first = torch.arange(0, num_tokens, BLOCK, dtype=torch.int32, device=start.device)  # first token of each block of keys

    def overlap(low: Tensor, high: Tensor) -> Tensor:
        """[T, T / B] number of keys of each block in [low, high)."""
        return (torch.minimum(high[:, None], first + BLOCK) - torch.maximum(low[:, None], first)).clamp_(min=0)

    visible = overlap(context_start, context_end) + overlap(start, token + 1)
    # Missing tokens of an incomplete last block count as seeing nothing.
    visible = torch.nn.functional.pad(visible, (0, 0, 0, -num_tokens % BLOCK)).unflatten(0, (-1, BLOCK))
    some, whole = visible.amax(dim=1) > 0, visible.amin(dim=1) == BLOCK

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        in_context = (key >= context_start[query]) & (key < context_end[query])
        return in_context | ((key >= start[query]) & (key <= query))

    return BlockMask.from_kv_blocks(
        *_listed(some & ~whole),
        *_listed(whole),
        BLOCK_SIZE=BLOCK,
        mask_mod=mask,
        seq_lengths=(num_tokens, num_tokens),
    )


def _listed(blocks: Tensor) -> tuple[Tensor, Tensor]:
    """From [T / B, T / B] flags to the number set in each row, and the columns sorted with set ones first."""
    count = blocks.sum(dim=1, dtype=torch.int32)
    order = blocks.to(torch.int8).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return count[None, None], order[None, None]

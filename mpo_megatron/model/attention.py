"""Attention over a packed row in which the responses of a group share their prompt.

A row is a sequence of segments. A prompt is a segment without context; a response is a segment whose context is its group's
prompt. A token attends to its segment's context and, causally, to its segment: never to a sibling response or another group.
With a window of W it attends only to the last W of these tokens, itself included; positions count, so a response's window
reaches back into its prompt. This module contains the exact back end, `sdpa`, the reference for the others (attention_flex,
attention_varlen), and the module that Megatron-Core calls.

Legend: T tokens of the row, A attention heads of this rank, Q key/value heads of this rank, D channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from mpo_megatron.model.context_parallel import heads_to_tokens, tokens_to_heads
from mpo_megatron.model.elementwise import rotate


class Segment(NamedTuple):
    """Tokens [start, end) of a row; their context is the tokens [context_start, context_end)."""

    start: int
    end: int
    context_start: int
    context_end: int


@dataclass(frozen=True, kw_only=True)
class ScoreSettings:
    """What a layer applies to the products of queries and keys before the softmax."""

    scale: float | None = None
    """Factor of the products; None: 1 / √D."""
    window: int | None = None
    """Number of tokens that a token attends to, itself included; None: its whole context and past."""
    cap: float | None = None
    """Scores s become cap · tanh(s / cap)."""


PLAIN = ScoreSettings()
"""Scaled products, no window, no cap."""


@dataclass
class RowLayout(PackedSeqParams):
    """The segments of one packed row. A PackedSeqParams, because Megatron-Core passes that to the attention core."""

    qkv_format: str = "sbhd"
    """Keeps Megatron-Core on its [sequence, batch, head, channel] path, which applies rotary angles token by token."""
    segments: tuple[Segment, ...] = ()
    """Segments in row order, covering the whole row."""
    routing: Any = None
    """Input for experts' routers about the row (model/routing.py), if any."""
    indices: dict[tuple[Callable[..., Any], int | None], Any] = field(default_factory=dict)
    """Indexes that back ends built from the segments, by builder function and window."""
    rotation: Tensor | None = None
    """[2, T (of this rank), 1, D / 2] cosines and sines, where GroupAttention rotates queries and keys."""

    def index[Index](self, build: Callable[[tuple[Segment, ...], int | None], Index], window: int | None = None) -> Index:
        """`build(segments, window)`, built once per row and shared by all layers with this window."""
        if (build, window) not in self.indices:
            self.indices[build, window] = build(self.segments, window)
        result: Index = self.indices[build, window]
        return result


RowAttention = Callable[[Tensor, Tensor, Tensor, RowLayout, ScoreSettings], Tensor]
"""A back end: query [T, A, D], key and value [T, Q, D], the row's layout and the score settings → [T, A, D]."""


def row_layout(segments: Iterable[tuple[int, int, int, int]], routing: Any = None) -> RowLayout:
    """A RowLayout from (start, end, context_start, context_end) rows."""
    return RowLayout(segments=tuple(Segment(*(int(edge) for edge in segment)) for segment in segments), routing=routing)


def sdpa_row_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: ScoreSettings = PLAIN) -> Tensor:
    """`segment_attention` over a row's segments."""
    return segment_attention(query, key, value, layout.segments, scores)


def segment_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Sequence[Segment], scores: ScoreSettings = PLAIN
) -> Tensor:
    """Exact attention, one segment at a time: softmax(q·kᵀ/√D)·v over each segment's context and causal past.

    A segment's output depends only on the segment and its context, which is another segment. Work and memory are those of the
    attended pairs; a segment longer than the window computes all its pairs.

    Args:
        query: [T, A, D]
        key: [T, Q, D], A a multiple of Q
        value: [T, Q, D]
    Returns:
        [T, A, D]
    """
    # Split, not sliced: a slice's gradient has the length of the row, a split's gradients are concatenated once.
    parts = [part.split([segment.end - segment.start for segment in segments]) for part in (query, key, value)]
    number_of = {(segment.start, segment.end): number for number, segment in enumerate(segments)}
    outputs = []
    for segment, queries, keys, values in zip(segments, *parts, strict=True):
        if segment.context_end > segment.context_start and scores.window != 1:
            context = number_of[segment.context_start, segment.context_end]
            first = (
                0 if scores.window is None else -(scores.window - 1)
            )  # the first context token that the segment's first token sees
            keys = torch.cat((parts[1][context][first:], keys))
            values = torch.cat((parts[2][context][first:], values))
        outputs.append(attend(queries, keys, values, scores))
    return torch.cat(outputs)


def attend(query: Tensor, key: Tensor, value: Tensor, scores: ScoreSettings) -> Tensor:
    """Attention of the last tokens [q, A, D] over all tokens [k, Q, D], causal and within the window."""
    num_queries, num_keys = len(query), len(key)
    parts = heads_first(query), heads_first(key), heads_first(value)
    mask: Any = None
    if scores.cap is not None or (scores.window is not None and num_keys > scores.window):
        mask = window_mask(num_queries, num_keys, scores.window, query.device)
    elif num_keys > num_queries:
        mask = causal_mask(num_queries, num_keys, query.device)
    if scores.cap is not None:
        output = _capped_attention(*parts, mask, scores.scale or query.shape[-1] ** -0.5, scores.cap)
    else:
        output = F.scaled_dot_product_attention(
            *parts, attn_mask=mask, is_causal=mask is None, enable_gqa=True, scale=scores.scale
        )
    return output.squeeze(0).transpose(0, 1)


def causal_mask(num_queries: int, num_keys: int, on: torch.device) -> Tensor:
    """[q, k] True where a query sees a key; on a GPU, PyTorch's `causal_lower_right`, which flash kernels accept."""
    if on.type == "cuda":
        from torch.nn.attention.bias import causal_lower_right  # imports PyTorch's compiler: a second

        return causal_lower_right(num_queries, num_keys)
    return torch.ones(num_queries, num_keys, dtype=torch.bool, device=on).tril(num_keys - num_queries)


def window_mask(num_queries: int, num_keys: int, window: int | None, on: torch.device) -> Tensor:
    """[q, k] True where a query sees a key; queries are the last q of the k tokens."""
    behind = torch.arange(num_keys - num_queries, num_keys, device=on)[:, None] - torch.arange(num_keys, device=on)
    return (behind >= 0) & (behind < (window or num_keys))


def _capped_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float, cap: float) -> Tensor:
    """Attention [1, A, q, D] with capped scores, which PyTorch's function lacks; softmax in float32 or wider."""
    key, value = (part.repeat_interleave(query.shape[1] // part.shape[1], dim=1) for part in (key, value))
    capped = cap * torch.tanh(query @ key.transpose(2, 3) * (scale / cap))
    dtype = torch.promote_types(query.dtype, torch.float32)
    weights = capped.masked_fill(~mask, float("-inf")).softmax(dim=-1, dtype=dtype)
    return weights.to(query.dtype) @ value


def heads_first(tensor: Tensor) -> Tensor:
    """[T, heads, D] → [1, heads, T, D], as scaled_dot_product_attention expects."""
    return tensor.transpose(0, 1).unsqueeze(0)


class GroupAttention(torch.nn.Module):
    """Attention core of Megatron-Core's SelfAttention for packed rows of groups; it has no weights."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: ProcessGroupCollection | None = None,
        attend: RowAttention = sdpa_row_attention,
        scores: ScoreSettings = PLAIN,
    ) -> None:
        super().__init__()
        if softmax_scale is not None or attention_type != "self" or attn_mask_type is not AttnMaskType.causal:
            raise ValueError("GroupAttention computes causal self-attention; pass the scale in `scores`.")
        self.attend, self.scores = attend, scores
        self.context_group = pg_collection.cp if pg_collection is not None and pg_collection.cp.size() > 1 else None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: None = None,
        packed_seq_params: RowLayout | None = None,
    ) -> Tensor:
        """Attend within the row; with context parallelism, inputs and result are this rank's tokens.

        Args:
            query: [T, 1, A, D]
            key: [T, 1, Q, D]
            value: [T, 1, Q, D]
            packed_seq_params: the whole row's layout
        Returns:
            [T, 1, A·D]
        """
        if packed_seq_params is None:
            raise ValueError("GroupAttention needs the row's layout in packed_seq_params.")
        query, key, value = query.squeeze(1), key.squeeze(1), value.squeeze(1)
        if packed_seq_params.rotation is not None:
            query, key = (rotate(part, *packed_seq_params.rotation) for part in (query, key))
        if self.context_group is not None:
            query, key, value = tokens_to_heads(query, key, value, self.context_group)
        output = self.attend(query, key, value, packed_seq_params, self.scores)
        if self.context_group is not None:
            output = heads_to_tokens(output, self.context_group)
        return output.reshape(output.shape[0], 1, -1)

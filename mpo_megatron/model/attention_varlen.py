"""`varlen`: standard variable-length flash attention, with keys and values gathered so that each segment follows its context.

Queries are the row's segments in order. Keys and values are gathered to [context, segment] for each segment, and the causal mask
is aligned at the bottom right: the last query sees all keys. A prompt with K responses needs P + Σ(P + R_k) keys. The copies are
small beside the activations if there are few key-value heads; `model.recompute = selective` keeps them for no layer.
Legend as in attention.py; E gathered keys.
"""

from __future__ import annotations

import functools
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.model.attention import PLAIN, RowLayout, ScoreSettings, Segment
from mpo_megatron.model.token_gather import TokenGather, build_gather, gather_tokens


@dataclass(frozen=True, kw_only=True)
class VarlenIndex:
    """Positions of each segment's queries and keys; shared by all layers of a row with the same window."""

    keys: TokenGather | None
    """The gathered keys; None if no segment has a context, because the keys are then the row itself."""
    query_ends: Tensor
    """[segments + 1] int32, number of queries before each segment, and in total."""
    key_ends: Tensor
    """[segments + 1] int32, the same for gathered keys."""
    max_queries: int
    """Longest segment."""
    max_keys: int
    """Longest segment with its context."""


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenIndex, ScoreSettings], Tensor]
"""Bottom-right causal attention: query [T, A, D], key and value [E, Q, D] → [T, A, D]."""


def build_varlen_index(segments: Sequence[Segment], window: int | None = None) -> VarlenIndex:
    """Index tensors of a row, on this rank's device; a context is limited to the window of the segment's first token."""
    edges = np.array(segments, dtype=np.int64).reshape(-1, 4)
    if window is not None:
        edges[:, 2] = np.maximum(edges[:, 2], edges[:, 3] - (window - 1))
    queries, contexts = edges[:, 1] - edges[:, 0], edges[:, 3] - edges[:, 2]
    keys = queries + contexts
    parts = [np.arange(*span) for start, end, *context in edges for span in (context, (start, end))]

    def ends(lengths: np.ndarray[Any, Any]) -> Tensor:
        return device.upload(np.concatenate(([0], lengths.cumsum())).astype(np.int32))

    return VarlenIndex(
        keys=build_gather(np.concatenate(parts)) if contexts.any() else None,
        query_ends=ends(queries),
        key_ends=ends(keys),
        max_queries=int(queries.max()),
        max_keys=int(keys.max()),
    )


def varlen_row_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, scores: ScoreSettings = PLAIN, kernel: Kernel | None = None
) -> Tensor:
    """Attention [T, A, D] of query [T, A, D] over key and value [T, Q, D] in a row of this layout.

    Args:
        kernel: by default the first of `find_kernel`
    """
    index = layout.index(build_varlen_index, scores.window)
    if index.keys is not None:
        key, value = (gather_tokens(part, index.keys) for part in (key, value))
    return (kernel or require_kernel(scores))(query, key, value, index, scores)


def require_kernel(scores: ScoreSettings = PLAIN) -> Kernel:
    """The kernel in use; `ImportError` if there is none."""
    kernel = find_kernel() if scores.cap is None else find_kernel(capped=True)
    if kernel is None:
        raise ImportError(NO_KERNEL)
    return kernel


NO_KERNEL = (
    "neither flash-attn (FlashAttention 3 on Hopper), nor a torch whose varlen_attn supports grouped heads, nor Transformer "
    "Engine with cuDNN 9.18 on a Hopper or Blackwell GPU is installed"
)


CUDNN_CHANNELS = 128
"""Widest head that cuDNN's kernel supports on all GPUs where it is used."""


@functools.cache
def find_kernel(*, capped: bool = False) -> Kernel | None:
    """The fastest installed variable-length kernel; with `capped`, flash-attn's, the only one that caps scores.

    On Hopper, FlashAttention 3 is faster than cuDNN's kernel; both reach 1.5 to 2 times the speed of FlashAttention 2, which
    flash-attn and torch compile there (arXiv:2407.08608, figures 5 and 6). On Blackwell, cuDNN's kernel is the one made for it;
    Transformer Engine prefers cuDNN's from Hopper on too. Older GPUs have FlashAttention 2.
    """
    finders = (_flash_attn_3, _flash_attn) if capped else (_flash_attn_3, _transformer_engine, _flash_attn, _torch)
    return next((kernel for kernel in (find() for find in finders) if kernel is not None), None)


def _flash_attn_3() -> Kernel | None:
    if not device.has_gpu() or torch.cuda.get_device_capability()[0] != 9:  # its kernels run on Hopper only
        return None
    try:
        from flash_attn_interface import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None

    def kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scores: ScoreSettings) -> Tensor:
        output = flash_attn_varlen_func(  # causal means bottom-right aligned
            *(query, key, value, index.query_ends, index.key_ends, index.max_queries, index.max_keys),
            causal=True,
            **_flash_options(scores),
        )
        result: Tensor = output[0] if isinstance(output, tuple) else output  # early versions also return log-sum-exps
        return result

    return kernel


def _flash_attn() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None

    def kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scores: ScoreSettings) -> Tensor:
        return flash_attn_varlen_func(  # causal means bottom-right aligned since flash-attn 2.1
            *(query, key, value, index.query_ends, index.key_ends, index.max_queries, index.max_keys),
            causal=True,
            **_flash_options(scores),
        )

    return kernel


def _flash_options(scores: ScoreSettings) -> dict[str, Any]:
    """Options of flash-attn's functions that differ from the defaults."""
    options: dict[str, Any] = {} if scores.scale is None else {"softmax_scale": scores.scale}
    if scores.window is not None:
        options["window_size"] = (scores.window - 1, 0)  # tokens before, and after
    if scores.cap is not None:
        options["softcap"] = scores.cap
    return options


def _torch() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scores: ScoreSettings) -> Tensor:
        output = varlen_attn(
            *(query, key, value, index.query_ends, index.key_ends, index.max_queries, index.max_keys),
            scale=scores.scale,
            # −1: no limit; causal, and the flash kernel beneath aligns it at the bottom right
            window_size=(-1 if scores.window is None else scores.window - 1, 0),
            enable_gqa=True,
        )
        assert isinstance(output, Tensor)  # a pair only with auxiliary outputs
        return output

    return kernel


def _transformer_engine() -> Kernel | None:
    try:
        from transformer_engine.pytorch import DotProductAttention
        from transformer_engine.pytorch.utils import get_cudnn_version
    except ImportError:
        return None
    # cuDNN's kernel supports such rows on Hopper and Blackwell only, and their gradients could be NaN before 9.18
    # (github.com/NVIDIA/TransformerEngine/issues/2186).
    if not device.has_gpu() or torch.cuda.get_device_capability()[0] not in (9, 10) or get_cudnn_version() < (9, 18):
        return None
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")  # if cuDNN refuses a row: raise instead of keeping all scores
    wider = _flash_attn() or _torch()  # for wider heads: not every cuDNN supports their backward

    @functools.cache
    def core(heads: int, channels: int, groups: int, scores: ScoreSettings) -> Any:
        return DotProductAttention(
            heads,
            channels,
            num_gqa_groups=groups,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
            softmax_scale=scores.scale,
            window_size=None if scores.window is None else (scores.window - 1, 0),
        )

    def kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex, scores: ScoreSettings) -> Tensor:
        if query.shape[2] > CUDNN_CHANNELS and wider is not None:
            return wider(query, key, value, index, scores)
        output = core(query.shape[1], query.shape[2], key.shape[1], scores)(
            *(query.contiguous(), key.contiguous(), value.contiguous()),
            cu_seqlens_q=index.query_ends,
            cu_seqlens_kv=index.key_ends,
            max_seqlen_q=index.max_queries,
            max_seqlen_kv=index.max_keys,
        )
        return output.view_as(query)

    return kernel

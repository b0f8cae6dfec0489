"""`varlen`: standard variable-length flash attention, with keys and values gathered so that each segment has its context.

Queries are the row's segments as they lie; keys and values are gathered to [context, segment] for each, and the causal mask is
aligned at the bottom right: the last query sees all keys. For a prompt with K responses that is P + Σ(P + R_k) keys; the copies
are small beside the activations where key/value heads are few, and `model.recompute = selective` keeps them for no layer.
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
from mpo_megatron.model.attention import RowLayout, Segment


@dataclass(frozen=True, kw_only=True)
class VarlenIndex:
    """Where each segment's queries and keys lie; the same for all layers of a row."""

    key_index: Tensor | None
    """[E] token of the row that each gathered key is of; None if no segment has a context: keys are the row's then."""
    query_ends: Tensor
    """[segments + 1] int32, queries before each segment, and all."""
    key_ends: Tensor
    """[segments + 1] int32, the same for gathered keys."""
    max_queries: int
    """Longest segment."""
    max_keys: int
    """Longest segment with its context."""


Kernel = Callable[[Tensor, Tensor, Tensor, VarlenIndex], Tensor]
"""Bottom-right causal attention: query [T, A, D], key and value [E, Q, D] → [T, A, D]."""


def build_varlen_index(segments: Sequence[Segment]) -> VarlenIndex:
    """Index tensors of a row, on this rank's device."""
    edges = np.array(segments, dtype=np.int64).reshape(-1, 4)
    queries, contexts = edges[:, 1] - edges[:, 0], edges[:, 3] - edges[:, 2]
    keys = queries + contexts
    parts = [np.arange(*span) for start, end, *context in edges for span in (context, (start, end))]

    def ends(lengths: np.ndarray[Any, Any]) -> Tensor:
        return device.upload(np.concatenate(([0], lengths.cumsum())).astype(np.int32))

    return VarlenIndex(
        key_index=device.upload(np.concatenate(parts)) if contexts.any() else None,
        query_ends=ends(queries),
        key_ends=ends(keys),
        max_queries=int(queries.max()),
        max_keys=int(keys.max()),
    )


class _Gather(torch.autograd.Function):
    """tensor[index], whose backward sums in float32: a prompt's keys get a gradient from every response."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.num_tokens = len(tensor)
        return tensor.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        (gradient,) = grad_outputs
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros((ctx.num_tokens, *gradient.shape[1:]), dtype=dtype)
        return total.index_add_(0, index, gradient.to(dtype)).to(gradient.dtype), None


def varlen_row_attention(query: Tensor, key: Tensor, value: Tensor, layout: RowLayout, kernel: Kernel | None = None) -> Tensor:
    """Attention [T, A, D] of query [T, A, D] over key and value [T, Q, D] in a row of this layout.

    Args:
        kernel: by default the first of `find_kernel`
    """
    index = layout.index(build_varlen_index)
    if index.key_index is not None:
        key, value = (_Gather.apply(part, index.key_index) for part in (key, value))
    return (kernel or require_kernel())(query, key, value, index)


def require_kernel() -> Kernel:
    """The kernel in use; `ImportError` if there is none."""
    kernel = find_kernel()
    if kernel is None:
        raise ImportError(NO_KERNEL)
    return kernel


NO_KERNEL = (
    "neither flash-attn, nor a torch whose varlen_attn takes grouped heads, nor Transformer Engine with cuDNN 9.18 on a Hopper "
    "or Blackwell GPU is there"
)


@functools.cache
def find_kernel() -> Kernel | None:
    """A variable-length kernel that is installed: flash-attn's, torch's own, or Transformer Engine's."""
    return _flash_attn() or _torch() or _transformer_engine()


def _flash_attn() -> Kernel | None:
    try:
        from flash_attn import flash_attn_varlen_func  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        return None

    def kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex) -> Tensor:
        return flash_attn_varlen_func(  # causal means bottom-right aligned since flash-attn 2.1
            query, key, value, index.query_ends, index.key_ends, index.max_queries, index.max_keys, causal=True
        )

    return kernel


def _torch() -> Kernel | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    if not {"window_size", "enable_gqa"} <= inspect.signature(varlen_attn).parameters.keys():
        return None

    def kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex) -> Tensor:
        output = varlen_attn(
            *(query, key, value, index.query_ends, index.key_ends, index.max_queries, index.max_keys),
            window_size=(-1, 0),  # causal; the flash kernel beneath aligns it at the bottom right
            enable_gqa=True,
        )
        assert isinstance(output, Tensor)  # it is a pair only if auxiliary outputs are asked for
        return output

    return kernel


def _transformer_engine() -> Kernel | None:
    try:
        from transformer_engine.pytorch import DotProductAttention
        from transformer_engine.pytorch.utils import get_cudnn_version
    except ImportError:
        return None
    # Its kernels are flash-attn's, which was looked for above, and cuDNN's, which takes such rows on Hopper and Blackwell only,
    # and whose gradients of them could be NaN before 9.18 (github.com/NVIDIA/TransformerEngine/issues/2186).
    if not device.has_gpu() or torch.cuda.get_device_capability()[0] not in (9, 10) or get_cudnn_version() < (9, 18):
        return None
    os.environ.setdefault("NVTE_UNFUSED_ATTN", "0")  # should cuDNN refuse a row: an error, not all scores in memory

    @functools.cache
    def core(heads: int, channels: int, groups: int) -> Any:
        return DotProductAttention(
            heads,
            channels,
            num_gqa_groups=groups,
            attention_dropout=0.0,
            qkv_format="thd",
            attn_mask_type="padding_causal_bottom_right",
        )

    def kernel(query: Tensor, key: Tensor, value: Tensor, index: VarlenIndex) -> Tensor:
        output = core(query.shape[1], query.shape[2], key.shape[1])(
            *(query.contiguous(), key.contiguous(), value.contiguous()),
            cu_seqlens_q=index.query_ends,
            cu_seqlens_kv=index.key_ends,
            max_seqlen_q=index.max_queries,
            max_seqlen_kv=index.max_keys,
        )
        return output.view_as(query)

    return kernel

"""Gather rows by token, some of them several times; the gradients of the copies are summed in a fixed order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.data.arrays import Int64


@dataclass(frozen=True)
class TokenGather:
    """The token of each gathered row."""

    index: Tensor
    """[E] token of each gathered row."""
    copies: tuple[tuple[Tensor, Tensor], ...]
    """For each number c of copies: the tokens [n] with c copies, and the positions [n, c] of these copies."""


def build_gather(index: Int64) -> TokenGather:
    """The gather of the tokens in `index` [E], on this rank's device; every token of the row must appear."""
    counts = np.bincount(index)
    order, starts = np.argsort(index, kind="stable"), np.concatenate(([0], counts.cumsum()[:-1]))
    copies = []
    for count in np.unique(counts):
        tokens = np.flatnonzero(counts == count)
        copies.append((device.upload(tokens), device.upload(order[starts[tokens, None] + np.arange(count)])))
    return TokenGather(device.upload(index), tuple(copies))


def gather_tokens(tensor: Tensor, gather: TokenGather) -> Tensor:
    """The rows [E, …] of `tensor` [T, …] named by the gather."""
    result: Tensor = _Gather.apply(tensor, gather)
    return result


class _Gather(torch.autograd.Function):
    """Backward sums a token's gradients from all its copies, in float32.

    The order is fixed: `index_add` on a GPU adds in any order, so a repeated run would get other gradients.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, gather: TokenGather) -> Tensor:
        ctx.gather = gather
        return tensor.index_select(0, gather.index)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        (gradient,) = grad_outputs
        gather: TokenGather = ctx.gather
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_empty((sum(len(tokens) for tokens, _ in gather.copies), *gradient.shape[1:]))
        for tokens, places in gather.copies:
            if places.shape[1] == 1:
                part = gradient.index_select(0, places[:, 0])
            else:
                part = gradient[places].sum(dim=1, dtype=dtype).to(gradient.dtype)
            total.index_copy_(0, tokens, part)  # each token is in exactly one part
        return total, None

"""Context parallelism: ranks share a row's tokens; attention exchanges tokens for heads.

Rank r of the group gets every `size`-th token of the row, from token r on, which balances prompts, responses and the work of the
output layer. For attention, an all-to-all gives each rank all tokens of some heads, in row order; a second one returns the
result. Attention itself sees whole rows, so any mask and any back end works.

Legend: T tokens of the row, N = T / size tokens of one rank, A attention heads of this tensor-parallel rank, Q its key/value
heads, D channels, S scored tokens.
"""

from __future__ import annotations

import torch
from megatron.core.tensor_parallel import reduce_from_tensor_model_parallel_region
from megatron.core.tensor_parallel.mappings import all_to_all
from torch import Tensor
from torch.distributed import ProcessGroup


def take_part(row: Tensor, group: ProcessGroup) -> Tensor:
    """This rank's tokens [1, N] of a row [1, T]; T is a multiple of the group's size."""
    if row.shape[1] % group.size():
        raise ValueError(f"a row of {row.shape[1]} tokens cannot be split evenly over {group.size()} context-parallel ranks")
    return row[:, group.rank() :: group.size()]


def tokens_to_heads(query: Tensor, key: Tensor, value: Tensor, group: ProcessGroup) -> tuple[Tensor, Tensor, Tensor]:
    """From all heads of some tokens to some heads of all tokens, in one all-to-all (backward: the reverse).

    If there are fewer key-value heads than ranks, each is sent to all ranks with its query heads; backward sums their gradients.

    Args:
        query: [N, A, D]
        key: [N, Q, D]
        value: [N, Q, D]
    Returns:
        [T, A / size, D] and twice [T, max(1, Q / size), D]
    """
    size = group.size()
    if key.shape[1] < size:
        key, value = (part.repeat_interleave(size // part.shape[1], dim=1) for part in (key, value))
    heads = [part.unflatten(1, (size, -1)) for part in (query, key, value)]
    mixed = spread_tokens(torch.cat(heads, dim=2).flatten(1, 2), group)
    query, key, value = mixed.split([part.shape[2] for part in heads], dim=1)
    return query, key, value


def spread_tokens(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """From all heads of some tokens, [N, A, D], to some heads of all tokens, [T, A / size, D] (backward: the reverse)."""
    mixed = _exchange(tensor.unflatten(1, (group.size(), -1)).transpose(0, 1), group)  # [size, N, A / size, D]
    return mixed.transpose(0, 1).flatten(0, 1)  # token i·size + r came from rank r


def heads_to_tokens(output: Tensor, group: ProcessGroup) -> Tensor:
    """Back from some heads of all tokens, [T, A / size, D], to all heads of this rank's tokens, [N, A, D]."""
    dealt = output.unflatten(0, (-1, group.size())).transpose(0, 1)  # [size, N, A / size, D]
    return _exchange(dealt, group).transpose(0, 1).flatten(1, 2)


def sum_parts(parts: Tensor, group: ProcessGroup) -> Tensor:
    """Sum over ranks in forward; every rank receives the gradient unchanged.

    All ranks compute the same loss, and each rank's part of the model receives only its own tokens' gradient. So the weights'
    gradients, summed over ranks, equal those of one rank without context parallelism.
    """
    return reduce_from_tensor_model_parallel_region(parts, group=group)


def _exchange(tensor: Tensor, group: ProcessGroup) -> Tensor:
    """Send slice r of the first dimension to rank r; slice r of the result came from rank r."""
    return all_to_all(group, tensor.contiguous())

"""Log-probabilities of given tokens from hidden states, without ever holding all logits.

Legend: S scored tokens, H hidden, V rows of the output weight on this tensor-parallel rank, C tokens of one chunk.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce


class _VocabParallelLogps(torch.autograd.Function):
    """log softmax(hidden · weightᵀ)[target], the vocabulary cut over `tp_group`; logits live one chunk at a time."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, vocab_size: int, chunk: int, tp_group: ProcessGroup
    ) -> Tensor:
        first = tp_group.rank() * weight.shape[0]
        local = targets - first
        owned = (local >= 0) & (local < weight.shape[0])
        local = local.clamp(0, weight.shape[0] - 1)
        log_normalizer = hidden.new_empty(len(targets), dtype=_accumulation_dtype(hidden))
        target_logit = torch.empty_like(log_normalizer)
        for start in range(0, len(targets), chunk):
            part = slice(start, start + chunk)
            logits = _chunk_logits(hidden[part], weight, vocab_size - first)  # [C, V]
            log_normalizer[part] = logits.logsumexp(dim=-1)
            target_logit[part] = logits.gather(1, local[part, None]).squeeze(1)
        target_logit.masked_fill_(~owned, 0.0)
        if tp_group.size() > 1:
            # Three scalars a token cross the tensor-parallel group: the largest local log-normalizer, then the sum of the
            # rescaled normalizers and the target's logit (zero on the ranks that do not own it).
            largest = log_normalizer.clone()
            all_reduce(largest, ReduceOp.MAX, group=tp_group)
            sums = torch.stack(((log_normalizer - largest).exp(), target_logit))
            all_reduce(sums, ReduceOp.SUM, group=tp_group)
            log_normalizer, target_logit = largest + sums[0].log(), sums[1]
        ctx.save_for_backward(hidden, weight, local, owned, log_normalizer)
        ctx.local_vocab, ctx.chunk = vocab_size - first, chunk
        return target_logit - log_normalizer

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, local, owned, log_normalizer = ctx.saved_tensors
        grad_logps = grad_outputs[0].to(log_normalizer.dtype)
        grad_hidden = torch.empty_like(hidden)
        # Chunks are summed in float32: in bf16 a long row's many small contributions would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=log_normalizer.dtype)
        for start in range(0, len(local), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            # d logp / d logits = onehot(target) − softmax
            grad_logits = _chunk_logits(hidden[part], weight, ctx.local_vocab)
            grad_logits = grad_logits.sub_(log_normalizer[part, None]).exp_().neg_()
            grad_logits.scatter_add_(1, local[part, None], owned[part, None].to(grad_logits.dtype))
            grad_logits = grad_logits.mul_(grad_logps[part, None]).to(hidden.dtype)
            grad_hidden[part] = grad_logits @ weight
            grad_weight += grad_logits.T @ hidden[part]
        return grad_hidden, grad_weight.to(weight.dtype), None, None, None, None


def _chunk_logits(hidden: Tensor, weight: Tensor, local_vocab: int) -> Tensor:
    """Logits [C, V] in float32 or better; rows of the weight past the real vocabulary are padding and get −inf."""
    logits = (hidden @ weight.T).to(_accumulation_dtype(hidden))
    if local_vocab < weight.shape[0]:
        logits[:, max(local_vocab, 0) :] = float("-inf")
    return logits


def _accumulation_dtype(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def vocab_parallel_logps(
    hidden: Tensor, weight: Tensor, targets: Tensor, *, vocab_size: int, chunk: int, tp_group: ProcessGroup
) -> Tensor:
    """log π(target | hidden) of each scored token, in nats.

    Peak extra memory is O(chunk × V): logits exist for one chunk at a time, and again in backward, where they are recomputed.
    The gradient with respect to `hidden` is this rank's part: the caller's layout must sum it over `tp_group`
    (`copy_to_tensor_model_parallel_region`, or the reduce-scatter of `gather_from_sequence_parallel_region`).

    Args:
        hidden: [S, H]
        weight: [V, H], this rank's rows of the output weight
        targets: [S] token ids in the whole vocabulary
        vocab_size: real vocabulary size; rows of the weight from there on are padding
        chunk: C, scored tokens whose logits exist at one time
    Returns:
        [S], float32 (float64 for float64 input)
    """
    return _VocabParallelLogps.apply(hidden, weight, targets, vocab_size, chunk, tp_group)

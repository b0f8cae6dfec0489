"""Log-probs, entropy and KL divergence of next-token distributions from hidden states, without ever holding all logits.

Logits exist for one chunk of tokens at a time, and are recomputed in backward. The last chunk's are kept, because backward starts
with it and needs that memory anyway. Only a few scalars per token cross the tensor-parallel group.

Why own code. Megatron-Core 0.16 fuses the cross-entropy of existing logits, not the projection before it; the fused kernels of
its development branch support single GPU generations and no padding rows. Liger's `fused_linear_cross_entropy` needs the whole
vocabulary on each rank and computes gradients in forward for a mean or sum (with `reduction="none"` it also repeats the
projection in backward). It returns the weight's gradient as a separate tensor. Here the vocabulary is sharded over ranks, each
token's coefficient is known only after the loss over whole groups, entropy and KL use the same logits, and the weight's gradient
goes directly into Megatron's buffer.

Legend: S scored tokens, H hidden, V rows of the output weight on this tensor-parallel rank, C tokens of one chunk, r rank of the
output layer's adapter; z logits, p = softmax(z) the policy's distribution, q the reference's, δ the target's one-hot vector.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, ReduceOp, all_reduce

from mpo_megatron import device
from mpo_megatron.config.model import kept_chunks

PADDING_LOGIT = -1e30
"""Logit of padding rows of the vocabulary: probability exactly 0, but finite, so that 0 · log 0 is 0."""


class Head(NamedTuple):
    """What the logits of a model's scored tokens are computed from: z = hidden · weightᵀ, and + narrow · upᵀ with an adapter."""

    hidden: Tensor
    """[S, H]"""
    weight: Tensor
    """[V, H], this rank's rows of the output weight"""
    narrow: Tensor | None = None
    """[S, r] scale · A x, if the output layer has an adapter"""
    up: Tensor | None = None
    """[V, r], this rank's rows of its B"""


class WeightGradient(NamedTuple):
    """Destination of the output weight's gradient, instead of autograd."""

    buffer: Tensor
    """[V, H] float32 (float64 for float64 input), accumulated chunk by chunk: Megatron's `main_grad`."""
    announce: bool
    """Return a placeholder to autograd, so that Megatron's DistributedDataParallel registers the gradient. Needed if its hook
    requires one (`overlap_grad_reduce`) and no other use of the weight provides one."""


class TokenStatistics(NamedTuple):
    """Statistics of each scored token's distribution, in nats; float32 (float64 for float64 input)."""

    logps: Tensor
    """[S] log p(target)"""
    entropy: Tensor | None
    """[S] −Σ p log p over the whole vocabulary"""
    kl: Tensor | None
    """[S] KL(p ‖ q) = Σ p (log p − log q) over the whole vocabulary"""


def vocab_parallel_statistics(
    head: Head,
    targets: Tensor,
    *,
    vocab_size: int,
    chunk: int,
    tp_group: ProcessGroup,
    entropy: bool = False,
    reference: Head | None = None,
    gradient: WeightGradient | None = None,
    logit_cap: float | None = None,
) -> TokenStatistics:
    """log π(target | hidden) of each scored token and, on request, entropy and KL divergence from a reference, in nats.

    Peak extra memory is O(chunk × V) for any S; without `gradient`, plus the weight's gradient in float32. Gradients are exact,
    and flow to `head` only. Those of `hidden` and `narrow` are this rank's part: the caller's layout must sum them over
    `tp_group` (`copy_to_tensor_model_parallel_region`, or the reduce-scatter of `gather_from_sequence_parallel_region`).

    Args:
        targets: [S] token ids in the whole vocabulary
        vocab_size: real vocabulary size; further rows of the weight are padding
        chunk: C, scored tokens whose logits exist at the same time
        entropy: whether to compute the entropy
        reference: the reference model's, which may have another H and r, for the KL divergence
        gradient: buffer to which backward adds the weight's gradient, instead of returning it to autograd
        logit_cap: logits z, also the reference's, become cap · tanh(z / cap)
    """
    rows = len(head.weight)
    kept = kept_chunks(chunk, rows) if torch.is_grad_enabled() else 0
    shape = _Shape(vocab_size - tp_group.rank() * rows, chunk, kept, tp_group, entropy, gradient, logit_cap)
    other = (None,) * len(Head._fields) if reference is None else (None if part is None else part.detach() for part in reference)
    logps, entropies, kl = _VocabParallelStatistics.apply(shape, targets, *head, *other)
    return TokenStatistics(logps, entropies if entropy else None, None if reference is None else kl)


class _Shape(NamedTuple):
    """Non-tensor arguments of the function below."""

    local_vocab: int
    """Further rows of the weight are padding; may be beyond V, or below 0."""
    chunk: int
    kept: int
    """Number of last chunks whose logits are kept for backward."""
    tp_group: ProcessGroup
    entropy: bool
    gradient: WeightGradient | None
    cap: float | None


class _VocabParallelStatistics(torch.autograd.Function):
    """logps, entropy, KL [S] each; unrequested ones are empty."""

    @staticmethod
    def forward(ctx: Any, shape: _Shape, targets: Tensor, *tensors: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        head, reference = _heads(tensors)
        hidden, rows = head.hidden, len(head.weight)
        first = shape.tp_group.rank() * rows
        owned = (targets >= first) & (targets < first + rows)
        local = (targets - first).clamp(0, rows - 1)
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        sums = hidden.new_zeros((len(_Sums._fields), len(targets)), dtype=dtype)
        parts = _chunks(len(targets), shape.chunk)
        ctx.kept = dict.fromkeys(range(max(0, len(parts) - shape.kept), len(parts)))
        for index, part in enumerate(parts):
            logits = compute_logits(head, part, shape.local_vocab, shape.cap)
            if index in ctx.kept:
                ctx.kept[index] = logits
            other = None if reference is None else compute_logits(reference, part, shape.local_vocab, shape.cap)
            sums[:, part] = _fused(reduce_logits)(logits, other, local[part], shape.entropy, dtype)
            del logits, other  # before the next chunk allocates its own
        extras = shape.entropy or reference is not None
        totals = _sum_over_vocabulary(_Sums(*sums), owned, shape.tp_group, extras=extras)
        ctx.save_for_backward(local, owned, *tensors, *totals)
        ctx.shape = shape
        return (
            totals.target - totals.log_normalizer,
            totals.entropy if shape.entropy else totals.entropy[:0],
            totals.kl if reference is not None else totals.kl[:0],
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        local, owned, *saved = ctx.saved_tensors
        head, reference = _heads(saved[: 2 * len(Head._fields)])
        hidden, weight, narrow, up = head
        totals = _Sums(*saved[2 * len(Head._fields) :])
        cap, local_vocab, dtype = ctx.shape.cap, ctx.shape.local_vocab, totals.target.dtype
        grad_logps, grad_entropy, grad_kl = (grad.to(dtype) for grad in grad_outputs)
        grad_hidden = torch.empty_like(hidden)
        # Chunks are summed in float32: in bf16 a long row's many small contributions would be rounded away.
        grad_weight = grad_narrow = grad_up = None
        if ctx.needs_input_grad[3]:
            given = ctx.shape.gradient
            grad_weight = torch.zeros_like(weight, dtype=dtype) if given is None else given.buffer
        if narrow is not None and up is not None:
            grad_narrow, grad_up = torch.empty_like(narrow), torch.zeros_like(up, dtype=dtype)
        for index, part in reversed([*enumerate(_chunks(len(local), ctx.shape.chunk))]):
            extras = _Extras(
                (grad_entropy[part], totals.entropy[part]) if ctx.shape.entropy else None,
                None
                if reference is None
                else (
                    *(grad_kl[part], totals.kl[part]),
                    *(compute_logits(reference, part, local_vocab, cap), totals.reference[part]),
                ),
            )
            logits = ctx.kept.pop(index, None)  # None when backward runs a second time
            if logits is None:
                logits = compute_logits(head, part, local_vocab, cap)
            slope = None if cap is None else 1 - (logits / cap).square_()  # ∂ cap·tanh(z / cap) / ∂z = 1 − tanh²
            grad_logits = _fused(differentiate_logits)(
                logits,
                (local[part], owned[part]),
                totals.log_normalizer[part],
                grad_logps[part],
                extras,
            )
            if slope is not None:  # padding rows have no gradient
                real = slice(max(local_vocab, 0))
                grad_logits[:, real] *= slope[:, real]
            grad_hidden[part] = grad_logits @ weight
            if grad_weight is not None:
                add_product(grad_weight, grad_logits.T, hidden[part])
            if narrow is not None and up is not None and grad_narrow is not None and grad_up is not None:
                grad_narrow[part] = grad_logits @ up
                add_product(grad_up, grad_logits.T, narrow[part])
            del logits, grad_logits, slope, extras
        return (
            *(None, None, grad_hidden, _handed_on(grad_weight, weight, ctx.shape.gradient)),
            *(grad_narrow, None if grad_up is None or up is None else grad_up.to(up.dtype)),
            *(None for _ in Head._fields),
        )


def _heads(tensors: Sequence[Tensor | None]) -> tuple[Head, Head | None]:
    """The policy's and the reference's head, from the function's arguments."""
    own, other = tensors[: len(Head._fields)], tensors[len(Head._fields) :]
    return Head(*own), None if other[0] is None else Head(*other)  # type: ignore[arg-type]


def _handed_on(summed: Tensor | None, weight: Tensor, gradient: WeightGradient | None) -> Tensor | None:
    """The weight's gradient for autograd: all of it, None if it is in its buffer, or a placeholder.

    Megatron's hook on the weight runs in each case, after backward of all its uses. It adds autograd's gradient to the buffer
    (None, or the embedding's part if weights are tied), unless `grad_added_to_main_grad` says that the buffer is complete.
    """
    if summed is None or gradient is None:
        return None if summed is None else summed.to(weight.dtype)
    if not gradient.announce:
        return None
    weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
    return torch.empty_like(weight)


class _Sums(NamedTuple):
    """Per token [S], over this rank's vocabulary shard or over the whole vocabulary."""

    log_normalizer: Tensor
    """log Σ exp z"""
    target: Tensor
    """the target's logit; arbitrary if another rank holds the target"""
    entropy: Tensor
    """of the distribution normalized over this shard"""
    reference: Tensor
    """log-normalizer of the reference"""
    kl: Tensor
    """between the distributions normalized over this shard"""


def compute_logits(head: Head, part: slice, local_vocab: int, cap: float | None = None) -> Tensor:
    """Logits [C, V] of one chunk, optionally capped; padding rows get a logit so low that they do not count."""
    logits = head.hidden[part] @ head.weight.T
    if head.narrow is not None and head.up is not None:
        logits.addmm_(head.narrow[part], head.up.T)
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    logits[:, max(local_vocab, 0) :] = PADDING_LOGIT
    return logits


def reduce_logits(logits: Tensor, reference: Tensor | None, targets: Tensor, entropy: bool, dtype: torch.dtype) -> Tensor:
    """`_Sums` [5, C] of one chunk of logits [C, V]; zeros for unrequested ones.

    Elementwise work and reductions only: on a GPU this compiles to one or two kernels that read each logit once or twice.
    """
    logits = logits.to(dtype)
    log_normalizer = logits.logsumexp(dim=-1)
    target = logits.gather(1, targets[:, None]).squeeze(1)
    entropies = reference_normalizer = kl = torch.zeros_like(target)
    if entropy or reference is not None:
        logps = logits - log_normalizer[:, None]
        probabilities = logps.exp()
        if entropy:
            entropies = -(probabilities * logps).sum(dim=-1)
        if reference is not None:
            reference = reference.to(dtype)
            reference_normalizer = reference.logsumexp(dim=-1)
            kl = (probabilities * (logps - (reference - reference_normalizer[:, None]))).sum(dim=-1)
    return torch.stack((log_normalizer, target, entropies, reference_normalizer, kl))


def _sum_over_vocabulary(local: _Sums, owned: Tensor, tp_group: ProcessGroup, *, extras: bool) -> _Sums:
    """Combine sums over each rank's vocabulary shard into sums over the whole vocabulary.

    Shard r has the share π_r = exp(L_r − L) of the probability, L the log-normalizer of all. In it, log p = log p_r + log π_r,
    so entropy = Σ π_r (entropy_r − log π_r) and KL = Σ π_r (KL_r + log π_r − log κ_r), with κ_r the reference's share.
    """
    if tp_group.size() == 1:
        return local
    largest = torch.stack((local.log_normalizer, local.reference))
    all_reduce(largest, ReduceOp.MAX, group=tp_group)  # avoids overflow
    sums = torch.stack(
        (
            (local.log_normalizer - largest[0]).exp(),
            local.target.masked_fill(~owned, 0.0),  # zero on ranks that do not own the target
            (local.reference - largest[1]).exp(),
        )
    )
    all_reduce(sums, ReduceOp.SUM, group=tp_group)
    log_normalizer, reference = largest[0] + sums[0].log(), largest[1] + sums[2].log()
    if not extras:
        return local._replace(log_normalizer=log_normalizer, target=sums[1])
    log_share, reference_log_share = local.log_normalizer - log_normalizer, local.reference - reference
    share = log_share.exp()
    parts = torch.stack((share * (local.entropy - log_share), share * (local.kl + log_share - reference_log_share)))
    all_reduce(parts, ReduceOp.SUM, group=tp_group)
    return _Sums(log_normalizer, sums[1], parts[0], reference, parts[1])


class _Extras(NamedTuple):
    """Inputs for the gradients of entropy and KL, if requested; [C] except the logits [C, V]."""

    entropy: tuple[Tensor, Tensor] | None
    """its gradient, its value"""
    kl: tuple[Tensor, Tensor, Tensor, Tensor] | None
    """its gradient, its value, the reference's logits, their log-normalizer"""


def differentiate_logits(
    logits: Tensor,
    targets: tuple[Tensor, Tensor],
    log_normalizer: Tensor,
    grad_logps: Tensor,
    extras: _Extras,
) -> Tensor:
    """Gradient [C, V] with respect to one chunk of logits, in their dtype; it may overwrite them.

    ∂ log p(target) / ∂z = δ − p;   ∂ entropy / ∂z = −p (log p + entropy);   ∂ KL / ∂z = p (log p − log q − KL).
    """
    local, owned = targets
    logps = logits.to(log_normalizer.dtype)
    logps = logps - log_normalizer[:, None] if torch.compiler.is_compiling() else logps.sub_(log_normalizer[:, None])
    slope = -grad_logps[:, None]
    if extras.entropy is not None:
        gradient, entropy = (part[:, None] for part in extras.entropy)
        slope = slope - gradient * (logps + entropy)
    if extras.kl is not None:
        gradient, kl, reference, reference_normalizer = extras.kl
        reference_logps = reference.to(log_normalizer.dtype) - reference_normalizer[:, None]
        slope = slope + gradient[:, None] * (logps - reference_logps - kl[:, None])
    grad_logits = logps.exp_().mul_(slope)
    at_target = (owned * grad_logps)[:, None]
    if torch.compiler.is_compiling():  # a scatter would be a separate kernel, with the whole float32 gradient in memory
        columns = torch.arange(logits.shape[1], device=logits.device)
        grad_logits = torch.where(columns == local[:, None], grad_logits + at_target, grad_logits)
    else:
        grad_logits.scatter_add_(1, local[:, None], at_target)
    return grad_logits.to(logits.dtype)


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, length)) for start in range(0, length, chunk)]


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """total += left @ right, `total` in float32 or wider; inside the GEMM where possible, because `total` is large."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    elif total.is_cuda and torch.__version__ >= "2.11":  # earlier versions lack it, or require one dtype for all
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
    else:
        total += left @ right


@functools.cache
def _fused(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compile the function on a GPU: otherwise its elementwise steps would each read and write all logits of the chunk."""
    return device.compile_for_any_length(function) if device.has_gpu() else function

"""The gated delta rule over a packed row: a response starts from the state at the end of its prompt.

A state S is a matrix [keys, values] for each value head. A token with key k, value v, decay g and rate β leads from S to
    S' = e^g · S + k (β (v − (e^g · S)ᵀ k))ᵀ
and outputs S'ᵀ q. Segments (attention.py) without a context start from S = 0. A segment with a context starts from the context's
last state, so a prompt is computed once and receives the gradients of all its responses.

The rule runs in chunks of C tokens (Yang et al., arXiv:2412.06464, section 3.3). With G the running sum of g in a chunk, and
D[i, j] = e^(G_i − G_j) for j ≤ i, the corrections U of a chunk that starts from S are
    (I + tril(diag(β) (K Kᵀ ⊙ D), −1)) U = diag(β) (V − diag(e^G) K S),
its outputs are diag(e^G) Q S + (Q Kᵀ ⊙ D) U, and its last state is e^(G_C) S + (diag(e^(G_C − G)) K)ᵀ U. Terms without S are
computed for all chunks of the row at once; then the chunks of all segments advance in parallel.

Legend: T tokens of the row, N chunks, C tokens of a chunk, H heads of queries and keys, R value heads per key head, K and V
channels of a key and of a value.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.data.arrays import Int64
from mpo_megatron.model.attention import RowLayout, Segment

DeltaRule = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, RowLayout], Tensor]
"""A back end: query and key [T, H, K], value [T, H·R, V], decay and rate [T, H·R] in float32, the row's layout → [T, H·R, V].
It normalizes queries and keys, and scales queries by 1 / √K."""


@dataclass(frozen=True, kw_only=True)
class StateOrder:
    """The non-empty segments of a row, those without a context first, and the state that each of the others starts from."""

    roots: list[Segment]
    branches: list[Segment]
    """Segments that start from another segment's last state."""
    origins: list[int]
    """For each branch, the index in `roots` of the segment it starts from."""


def order_states(segments: Sequence[Segment]) -> StateOrder:
    """The order in which a row's states depend on each other; longest segments first.

    Raises:
        ValueError: a context is not exactly a segment without a context.
    """
    filled = sorted((segment for segment in segments if segment.end > segment.start), key=lambda part: part.start - part.end)
    roots = [segment for segment in filled if segment.context_end == segment.context_start]
    branches = [segment for segment in filled if segment.context_end > segment.context_start]
    number = {(segment.start, segment.end): index for index, segment in enumerate(roots)}
    contexts = [(segment.context_start, segment.context_end) for segment in branches]
    if not set(contexts) <= set(number):
        raise ValueError("a segment's context must be a whole segment that has none")
    return StateOrder(roots=roots, branches=branches, origins=[number[context] for context in contexts])


@dataclass(frozen=True, kw_only=True)
class ChunkIndex:
    """Positions of a row's tokens in chunks; shared by all layers."""

    tokens: Tensor
    """[N·C] token at each position of a chunk; T for an empty position."""
    places: Tensor
    """[T] position of each token."""
    size: int
    """C: tokens per chunk."""
    steps: tuple[tuple[int, ...], tuple[int, ...]]
    """Number of chunks that advance together in each step, for segments without and with a context. A step continues the first
    segments of the step before it."""
    origins: tuple[tuple[int, int], ...]
    """(index of a segment without a context, number of segments that start from it), where that number is positive."""
    order: Tensor
    """[branches] position of each segment with a context among these, sorted by origin."""


def build_chunks(segments: Sequence[Segment], size: int) -> ChunkIndex:
    """Chunks of a row, step by step, of `size` tokens."""
    states = order_states(segments)
    parts: list[Int64] = []
    steps = []
    total = max(segment.end for segment in segments)
    for level in (states.roots, states.branches):
        counts = []
        for first in range(0, max((part.end - part.start for part in level), default=0), size):
            running = [part for part in level if part.end - part.start > first]
            counts.append(len(running))
            for part in running:
                chunk = np.full(size, total, dtype=np.int64)
                start, end = part.start + first, min(part.start + first + size, part.end)
                chunk[: end - start] = np.arange(start, end)
                parts.append(chunk)
        steps.append(tuple(counts))
    tokens = np.concatenate(parts)
    places = np.zeros(total + 1, dtype=np.int64)
    places[tokens] = np.arange(len(tokens))
    origins = np.array(states.origins, dtype=np.int64)
    by_origin = np.argsort(origins, kind="stable")
    order = np.zeros_like(origins)
    order[by_origin] = np.arange(len(origins))
    numbers, counts_of = np.unique(origins, return_counts=True)
    return ChunkIndex(
        tokens=device.upload(tokens),
        places=device.upload(places[:-1]),
        size=size,
        steps=(steps[0], steps[1]),
        origins=tuple(zip(numbers.tolist(), counts_of.tolist(), strict=True)),
        order=device.upload(order),
    )


def chunked_delta_rule(size: int) -> DeltaRule:
    """The back end `torch`, in plain operations for any device, with chunks of `size` tokens."""

    def build(segments: tuple[Segment, ...], _window: int | None) -> ChunkIndex:
        return build_chunks(segments, size)

    def rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, layout: RowLayout) -> Tensor:
        return run_chunks(query, key, value, decay, rate, layout.index(build))

    return rule


def run_chunks(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, chunks: ChunkIndex) -> Tensor:
    """The rule for given chunks: in float32, or in the inputs' dtype if that is wider."""
    heads, dtype = key.shape[1], torch.promote_types(value.dtype, torch.float32)

    def split(tensor: Tensor) -> Tensor:
        """[T, H or H·R, …] → [N, H, 1 or R, C, …], zeros at empty positions."""
        rows = F.pad(tensor.to(dtype).flatten(1), (0, 0, 0, 1)).index_select(0, chunks.tokens)
        return rows.view(-1, chunks.size, heads, tensor.shape[1] // heads, *tensor.shape[2:]).transpose(1, 2).transpose(2, 3)

    queries, keys, values, rates = split(unit(query.to(dtype))), split(unit(key.to(dtype))), split(value), split(rate)
    queries = queries * query.shape[-1] ** -0.5
    total = split(decay).cumsum(dim=-1)  # G
    upper = torch.ones(chunks.size, chunks.size, dtype=torch.bool, device=total.device).triu(1)
    between = (total[..., :, None] - total[..., None, :]).masked_fill(upper, float("-inf")).exp()  # D
    system = (keys @ keys.transpose(-1, -2)) * between * rates[..., None]
    since = total.exp()[..., None]
    right = torch.cat((values, keys * since), dim=-1) * rates[..., None]
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)  # reads only below the diagonal
    own, read = solved.split([value.shape[-1], key.shape[-1]], dim=-1)  # U = own − read · S
    within = (queries @ keys.transpose(-1, -2)) * between
    last = total[..., -1:]
    sizes = [size for level in chunks.steps for size in level]
    parts = [
        part.split(sizes)
        for part in (own, read, within, queries * since, (keys * (last - total).exp()[..., None]).transpose(-1, -2), last.exp())
    ]
    outputs: list[Tensor] = []
    ends: Tensor | None = None
    step = 0
    for level in chunks.steps:
        state = None if ends is None else _starts(ends, chunks)
        finished: list[Tensor] = []
        for size in level:
            now, read_now, within_now, queries_now, keys_now, decay_now = (part[step] for part in parts)
            if state is not None and len(state) > size:
                finished.append(state[size:])
                state = state[:size]
            if state is not None:
                now = now - read_now @ state
            output, added = within_now @ now, keys_now @ now
            outputs.append(output if state is None else output + queries_now @ state)
            state = added if state is None else state * decay_now[..., None] + added
            step += 1
        if state is not None:
            ends = torch.cat((state, *reversed(finished)))
    everything = torch.cat(outputs).transpose(2, 3).transpose(1, 2).flatten(2, 3).flatten(0, 1)  # [N·C, H·R, V]
    return everything.index_select(0, chunks.places).to(value.dtype)


def unit(tensor: Tensor) -> Tensor:
    """Vectors scaled to length 1, as flash-linear-attention and `transformers` do."""
    return tensor * torch.rsqrt(tensor.square().sum(dim=-1, keepdim=True) + 1e-6)


def _starts(ends: Tensor, chunks: ChunkIndex) -> Tensor | None:
    """First states of segments with a context, from last states of those without; gradients are summed in a fixed order."""
    if not chunks.origins:
        return None
    copies = [ends[number : number + 1].expand(count, *ends.shape[1:]) for number, count in chunks.origins]
    return torch.cat(copies).index_select(0, chunks.order)

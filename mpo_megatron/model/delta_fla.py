"""`fla`: the gated delta rule with flash-linear-attention's kernels, for GPUs.

Its function takes concatenated sequences of any length, and an initial state for each. So a row takes two calls: prompts (and
other segments without context) from zero states, then responses from their prompts' last states. Legend as in delta_rule.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.data.arrays import Int64
from mpo_megatron.model.attention import RowLayout, Segment
from mpo_megatron.model.delta_rule import order_states
from mpo_megatron.model.token_gather import TokenGather, build_gather, gather_tokens


@dataclass(frozen=True, kw_only=True)
class LevelSequences:
    """Segments computed in one call."""

    tokens: Tensor
    """Their tokens, concatenated."""
    ends: Tensor
    """[segments + 1] int64: number of tokens before each, and in total."""


@dataclass(frozen=True, kw_only=True)
class SequenceIndex:
    """The calls for a row; shared by all layers."""

    roots: LevelSequences
    branches: LevelSequences | None
    """Segments with a context, if any."""
    origins: TokenGather | None
    """For each branch, the root whose last state it starts from; then every root once more."""
    places: Tensor
    """[T] position of each token in the concatenated outputs of both calls."""


def build_sequences(segments: Sequence[Segment], window: int | None = None) -> SequenceIndex:
    """The calls for a row; `window` is ignored."""
    states = order_states(segments)
    order = [_tokens(level) for level in (states.roots, states.branches) if level]
    everything = np.concatenate(order)
    places = np.empty_like(everything)
    places[everything] = np.arange(len(everything))
    origins = np.array([*states.origins, *range(len(states.roots))], dtype=np.int64)
    return SequenceIndex(
        roots=_sequences(order[0], states.roots),
        branches=_sequences(order[1], states.branches) if states.branches else None,
        origins=build_gather(origins) if states.branches else None,
        places=device.upload(places),
    )


def _tokens(level: Sequence[Segment]) -> Int64:
    return np.concatenate([np.arange(part.start, part.end) for part in level])


def _sequences(tokens: Int64, level: Sequence[Segment]) -> LevelSequences:
    ends = np.cumsum([0, *(part.end - part.start for part in level)])
    return LevelSequences(tokens=device.upload(tokens), ends=device.upload(ends.astype(np.int64)))


def fla_delta_rule(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, layout: RowLayout) -> Tensor:
    """The back end `fla`; see `DeltaRule`."""
    index = layout.index(build_sequences)
    # Value heads j · R … j · R + R − 1 share key head j in the kernels, too.
    inputs = [query, key, value, decay.float(), rate.to(value.dtype)]

    def call(part: LevelSequences, state: Tensor | None, *, final: bool) -> tuple[Tensor, Tensor | None]:
        own_query, own_key, own_value, own_decay, own_rate = (item.index_select(0, part.tokens) for item in inputs)
        return _kernel(own_query, own_key, own_value, own_decay, own_rate, part.ends, state, final=final)

    if index.branches is None:
        outputs, _ = call(index.roots, None, final=False)
        return outputs.index_select(0, index.places)
    outputs, ends = call(index.roots, None, final=True)
    assert ends is not None
    assert index.origins is not None
    states = gather_tokens(ends, index.origins)[: len(index.branches.ends) - 1].contiguous()
    more, _ = call(index.branches, states, final=False)
    return torch.cat((outputs, more)).index_select(0, index.places)


def _kernel(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, ends: Tensor, state: Tensor | None, *, final: bool
) -> tuple[Tensor, Tensor | None]:
    """Outputs [T, H·R, V] of concatenated sequences, and with `final` their last states [sequences, H·R, K, V]."""
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule  # type: ignore[import-not-found,unused-ignore]

    output, last = chunk_gated_delta_rule(
        *(part.contiguous()[None] for part in (query, key, value)),
        g=decay.contiguous()[None],
        beta=rate.contiguous()[None],
        initial_state=state,
        output_final_state=final,
        use_qk_l2norm_in_kernel=True,
        cu_seqlens=ends,
    )
    return output[0], last

"""Key-value cache of the embedded engine, in preallocated buffers: a step writes only its own tokens.

transformers' dynamic cache concatenates, which copies every key and value of the batch at every token: a third of the time on a
CPU. Sliding-window layers keep transformers' own cache, which holds one window. Gated DeltaNet layers hold a state.

Shapes: N rows, A key-value heads, T tokens so far, D channels of a head.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

ROOM = 64
"""Tokens of spare room in a buffer before it must be copied to a larger one."""


class RoomyLayer(DynamicLayer):
    """A layer whose `keys` and `values` [N, A, T, D] are views of larger buffers."""

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Add tokens [N, A, new, D]; return all keys and values."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = (states[:, :, :0] for states in (key_states, value_states))
            self.room = 0
        assert self.keys is not None
        assert self.values is not None
        before = self.keys.shape[-2]
        length = before + key_states.shape[-2]
        if length > self.room:
            self.room = length + ROOM
            self.buffers = [_make_room(states, self.room) for states in (self.keys, self.values)]
        for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
            buffer[:, :, before:length] = states
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may appear several times."""
        if self.get_seq_length() > 0:
            length = self.keys.shape[-2]
            self.buffers = [_make_room(states[indices], self.room) for states in (self.keys, self.values)]
            self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)


class StateLayer(LinearAttentionLayer):
    """A layer whose past is a state: the convolution's [N, …] and the recurrent one [N, …]."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep these rows, in this order; a row may appear several times."""
        for states in (self.conv_states, self.recurrent_states):
            for index, state in states.items():
                states[index] = None if state is None else state[indices]


def _make_room(states: Tensor, room: int) -> Tensor:
    """A buffer [N, A, room, D] that starts with `states`."""
    rows, heads, length, channels = states.shape
    buffer = states.new_empty(rows, heads, room, channels)
    buffer[:, :, :length] = states
    return buffer


def build_cache(config: Any) -> DynamicCache:
    """An empty cache for a model with this configuration."""
    cache = DynamicCache(config=config)
    ours: dict[type, Any] = {DynamicLayer: RoomyLayer, LinearAttentionLayer: StateLayer}
    cache.layers = [ours[type(layer)]() if type(layer) in ours else layer for layer in cache.layers]
    return cache

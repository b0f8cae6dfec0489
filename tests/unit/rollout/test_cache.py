"""The preallocated cache has the same content as transformers' own cache."""

from __future__ import annotations

import torch
from transformers.cache_utils import DynamicLayer

from mpo_megatron.rollout.engines.cache import ROOM, RoomyLayer


def test_same_keys_and_values_as_transformers() -> None:
    """A prompt, its repetition, tokens beyond the buffer's size, and rows that end in between."""
    ours, theirs = RoomyLayer(), DynamicLayer()
    draw = torch.Generator().manual_seed(0)

    def update(rows: int, tokens: int) -> None:
        states = torch.randn(2, rows, 3, tokens, 4, generator=draw)
        for mine, other in zip(ours.update(*states), theirs.update(*states), strict=True):
            assert torch.equal(mine, other)
        assert ours.get_seq_length() == theirs.get_seq_length()

    def select(*rows: int) -> None:
        for layer in (ours, theirs):
            layer.batch_select_indices(torch.tensor(rows))
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)

    update(2, 5)
    select(0, 0, 0, 1, 1, 1)
    for _ in range(ROOM + 2):
        update(6, 1)
    select(5, 0, 3)
    for _ in range(ROOM + 2):
        update(3, 1)


def test_a_step_copies_no_earlier_token() -> None:
    layer = RoomyLayer()
    layer.update(*torch.zeros(2, 1, 1, 3, 2))
    place = layer.keys.data_ptr()
    for _ in range(ROOM):
        layer.update(*torch.zeros(2, 1, 1, 1, 2))
    assert layer.keys.data_ptr() == place

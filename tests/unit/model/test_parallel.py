"""Process groups of a `with` block that is still open at exit, and groups of single ranks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from mpo_megatron.config import ParallelConfig
from mpo_megatron.model import parallel


def test_a_block_that_the_interpreters_end_closes_undoes_nothing() -> None:
    block = parallel.model_parallel(ParallelConfig(), seed=1)
    with block:
        assert torch.distributed.is_initialized()
    assert not torch.distributed.is_initialized()
    block = parallel.model_parallel(ParallelConfig(), seed=1)
    block.__enter__()
    block.gen.close()  # type: ignore[attr-defined]
    assert torch.distributed.is_initialized()
    parallel._take_down(started=True)


def test_one_rank_has_one_group() -> None:
    with parallel.model_parallel(ParallelConfig(), seed=1) as ranks:
        assert ranks.tensor is ranks.data is ranks.pipeline is torch.distributed.group.WORLD
        assert len(torch.distributed.distributed_c10d._world.pg_map) == 1


def test_ranks_share_only_groups_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank creates the same groups in the same order, of which it may be no member."""
    created = []

    def create(ranks: list[int], timeout: int, **options: Any) -> object:
        created.append(ranks)
        return object()

    monkeypatch.setattr(parallel_state, "create_group", create)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with parallel._single_ranks_share_groups():
        made = [parallel_state.create_group(ranks, timeout=1) for ranks in ([0], [1], [0, 1], [0], [1], [0, 1])]
    assert created == [[0], [1], [0, 1], [0, 1]]
    assert made[3:5] == made[:2]
    assert len(set(made)) == 4
    assert parallel_state.create_group is create

"""Process groups of a `with` block that is still open at exit."""

from __future__ import annotations

import torch

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

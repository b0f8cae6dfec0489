"""What all tests share."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Must precede any import of torch: tests and ranks run in parallel, with one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is downloaded: tests build their own inputs.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest

if TYPE_CHECKING:
    from mpo_megatron.model.parallel import Ranks


def pytest_collection_finish() -> None:
    """Exclude imported objects from garbage collection, which is slow otherwise (Megatron collects in every save)."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests marked `gpu` on machines without a GPU."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    """A world of one rank, this process."""
    from mpo_megatron.config import ParallelConfig  # here, since most tests need no Megatron-Core
    from mpo_megatron.model.parallel import model_parallel

    with model_parallel(ParallelConfig(), seed=1) as ranks:
        yield ranks

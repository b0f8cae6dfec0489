"""What all tests share."""

from __future__ import annotations

import gc
import os

# Before torch is imported anywhere: tests run side by side, and ranks beside each other; one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Nothing is downloaded: what a test needs it makes.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest


def pytest_collection_finish() -> None:
    """What was imported is no garbage: spare each collection the look at it (Megatron makes one in every save)."""
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what needs a GPU where there is none."""
    wanted = [item for item in items if item.get_closest_marker("gpu")]
    if not wanted:
        return
    import torch

    if not torch.cuda.is_available():
        for item in wanted:
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

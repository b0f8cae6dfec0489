"""The examples are outside the package: make them importable from any working directory."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    # Tiny tensors: threads cost more than they save.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

"""The examples live beside the package, not in it: make them importable wherever pytest is started."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[3]))


@pytest.fixture(scope="package", autouse=True)
def one_thread():
    # Tiny tensors: handing them to threads costs more than it saves.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)

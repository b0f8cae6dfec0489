"""On a GPU: flash-linear-attention's kernels equal the gated delta rule in plain operations, gradients included."""

from __future__ import annotations

import pytest
import torch

from mpo_megatron.model.attention import Segment
from mpo_megatron.stack.delta_kernels import broken_delta_kernels, missing_for_delta_kernels
from tests.unit.model.fla_rows import row_errors
from tests.unit.model.rows import random_groups_row

pytestmark = pytest.mark.gpu

# bf16 rounds by 2^-9, and the kernels round keys, values and the inverse of a chunk's system to it.
TOLERANCE = 3e-2


@pytest.fixture(autouse=True)
def kernels() -> None:
    if (missing := missing_for_delta_kernels() or broken_delta_kernels()) is not None:
        pytest.skip(missing)


@pytest.mark.parametrize("seed", range(4))
def test_equals_plain_operations(seed: int) -> None:
    errors = row_errors(random_groups_row(seed, max_tokens=200), torch.bfloat16, "cuda", channels=64)
    assert max(errors.values()) <= TOLERANCE, errors


def test_long_rows() -> None:
    """A prompt of 4,096 tokens, 16 responses of one to 512 tokens: decays multiply over many chunks."""
    segments = [Segment(0, 4096, 0, 0)]
    for number in range(16):
        start = segments[-1].end
        segments.append(Segment(start, start + (1, 64, 65, 512)[number % 4], 0, 4096))
    errors = row_errors(segments, torch.bfloat16, "cuda", channels=128)
    assert max(errors.values()) <= TOLERANCE, errors

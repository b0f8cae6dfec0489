"""Segment sums of log-probs: exact, and in an order that a GPU keeps, so that a resumed run comes to the same numbers."""

from __future__ import annotations

import math
import re
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpo_megatron.train.step import sum_responses


class Operations(TorchDispatchMode):
    """Names of the operations that run, without overload and trailing underscore."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.overloadpacket.__name__.rstrip("_"))
        return func(*args, **(kwargs or {}))


def row_of(lengths: list[int]) -> Any:
    """What `sum_responses` reads of a row."""
    response_of = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.long))
    return SimpleNamespace(response_of=response_of, responses=torch.zeros(len(lengths), 2, dtype=torch.long))


def test_sums_and_gradients_of_every_response() -> None:
    lengths = [1, 700, 2, 31, 1]
    row, logps = row_of(lengths), torch.randn(sum(lengths)).mul(3).requires_grad_()
    sums = sum_responses(row, logps)
    assert sums.dtype == torch.float64
    expected = [math.fsum(part.tolist()) for part in logps.detach().split(lengths)]
    torch.testing.assert_close(sums.detach(), torch.tensor(expected, dtype=torch.float64), rtol=0.0, atol=1e-11)
    weights = torch.randn(len(lengths), dtype=torch.float64)
    (weights * sums).sum().backward()
    assert torch.equal(logps.grad, torch.repeat_interleave(weights.float(), torch.tensor(lengths)))


def test_filler_row_has_no_sums() -> None:
    logps = torch.zeros(0, requires_grad=True)
    sum_responses(row_of([]), logps).sum().backward()
    assert logps.grad is not None
    assert logps.grad.shape == (0,)


def test_order_is_fixed_on_a_gpu() -> None:
    documented = set(re.findall(r":func:`torch\.(?:\w+\.)*(\w+?)_?`", torch.use_deterministic_algorithms.__doc__ or ""))
    assert "index_add" in documented
    row, logps = row_of([4, 8]), torch.randn(12, requires_grad=True)
    with Operations() as operations:
        sum_responses(row, logps).sum().backward()
    assert operations.names
    assert not operations.names & documented

"""Log-probs from hidden states equal log_softmax of all logits, gradients included, for any chunk and padding."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mpo_megatron.config import ParallelConfig
from mpo_megatron.model.logprobs import vocab_parallel_logps
from mpo_megatron.model.parallel import Ranks, model_parallel


@pytest.fixture(scope="module")
def ranks() -> Iterator[Ranks]:
    with model_parallel(ParallelConfig(), seed=1) as ranks:
        yield ranks


def inputs(num_tokens: int, dtype: torch.dtype, vocab: int = 37, padded: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 16, generator=generator, dtype=dtype)
    weight = torch.randn(padded, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int = 37) -> Tensor:
    return (hidden @ weight[:vocab].T).log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
@pytest.mark.parametrize("num_tokens", [1, 7, 23])
def test_equals_plain_log_softmax(ranks: Ranks, chunk: int, num_tokens: int) -> None:
    hidden, weight, targets = inputs(num_tokens, torch.float64)
    ours = vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=chunk, tp_group=ranks.tensor)
    plain = plain_logps(hidden, weight, targets)
    assert ours.dtype == torch.float64
    torch.testing.assert_close(ours, plain)
    coefficients = torch.randn(num_tokens, dtype=torch.float64)
    for left, right in zip(
        torch.autograd.grad((ours * coefficients).sum(), (hidden, weight)),
        torch.autograd.grad((plain * coefficients).sum(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


def test_gradcheck(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(5, torch.float64)

    def logps(hidden: Tensor, weight: Tensor) -> Tensor:
        return vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=2, tp_group=ranks.tensor)

    assert torch.autograd.gradcheck(logps, (hidden, weight))


def test_bf16_is_reduced_in_float32(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(23, torch.bfloat16)
    ours = vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=8, tp_group=ranks.tensor)
    assert ours.dtype == torch.float32
    exact = plain_logps(hidden.double(), weight.double(), targets)
    # The only bf16 rounding is that of the logits themselves, up to 2^-9 of their size.
    largest = (hidden.double() @ weight.double().T).abs().max().item()
    assert (ours.double() - exact).abs().max().item() <= 2 * largest * 2**-9
    gradient = torch.autograd.grad(ours.sum(), weight)[0]
    assert gradient.dtype == torch.bfloat16
    assert gradient[37:].abs().max() == 0


def test_padding_of_the_vocabulary_counts_nothing(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(7, torch.float64)
    before = vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=3, tp_group=ranks.tensor)
    with torch.no_grad():
        weight[37:] = 100.0
    after = vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=3, tp_group=ranks.tensor)
    assert torch.equal(before, after)


def test_no_scored_tokens(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(0, torch.float64)
    logps = vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=3, tp_group=ranks.tensor)
    logps.sum().backward()
    assert logps.shape == (0,)
    assert weight.grad is not None
    assert weight.grad.abs().max() == 0

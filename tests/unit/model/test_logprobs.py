"""Log-probs from hidden states equal log_softmax of all logits, gradients included, for any chunk and padding."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mpo_megatron.model import logprobs
from mpo_megatron.model.logprobs import Head, WeightGradient, _Extras, differentiate_logits, vocab_parallel_statistics
from mpo_megatron.model.parallel import Ranks
from tests.distributed.launch import run_ranks


def inputs(num_tokens: int, dtype: torch.dtype, vocab: int = 37, padded: int = 48) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(num_tokens, 16, generator=generator, dtype=dtype)
    weight = torch.randn(padded, 16, generator=generator, dtype=dtype)
    targets = torch.randint(0, vocab, (num_tokens,), generator=generator)
    return hidden.requires_grad_(), weight.requires_grad_(), targets


def vocab_parallel_logps(*tensors: Tensor, **settings: Any) -> Tensor:
    hidden, weight, targets = tensors
    return vocab_parallel_statistics(Head(hidden, weight), targets, **settings).logps


def plain_logps(hidden: Tensor, weight: Tensor, targets: Tensor, vocab: int = 37) -> Tensor:
    return (hidden @ weight[:vocab].T).log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)


@pytest.fixture(autouse=True)
def small_vocabularies_count_as_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits of one chunk are kept for backward, those of the others recomputed."""
    monkeypatch.setattr(logprobs, "kept_chunks", lambda chunk, vocabulary: 1)


@pytest.mark.parametrize("chunk", [1, 5, 7, 100])
@pytest.mark.parametrize("num_tokens", [1, 7, 23])
@pytest.mark.parametrize("kept", [1, 2, 100])
def test_equals_plain_log_softmax(ranks: Ranks, kept: int, chunk: int, num_tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "kept_chunks", lambda chunk, vocabulary: kept)
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


def test_an_adapter_is_added_to_the_logits(ranks: Ranks) -> None:
    """Values and gradients of hidden states, A x and B; with B = 0, the logits of the frozen weight to the last bit."""
    hidden, weight, targets = inputs(7, torch.float64)
    weight.requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    narrow, up = (torch.randn(rows, 3, generator=generator, dtype=torch.float64).requires_grad_() for rows in (7, 48))
    settings: dict[str, Any] = {"vocab_size": 37, "chunk": 3, "tp_group": ranks.tensor, "logit_cap": 4.0}

    logits = 4 * torch.tanh((hidden @ weight[:37].T + narrow @ up[:37].T) / 4)
    plain = logits.log_softmax(dim=-1).gather(1, targets[:, None]).squeeze(1)
    reference = Head(*(part.detach().roll(1, 0) for part in (hidden, weight, narrow, up)))  # it has an adapter, too

    def statistics(hidden: Tensor, narrow: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        found = vocab_parallel_statistics(Head(hidden, weight, narrow, up), targets, reference=reference, **settings)
        assert found.kl is not None
        return found.logps, found.kl

    torch.testing.assert_close(statistics(hidden, narrow, up)[0], plain)
    assert torch.autograd.gradcheck(statistics, (hidden, narrow, up))
    for dtype in (torch.float32, torch.bfloat16):
        head = Head(*(part.detach().to(dtype) for part in (hidden, weight, narrow, up * 0)))
        ours, base = (
            vocab_parallel_statistics(each, targets, **settings).logps for each in (head, Head(head.hidden, head.weight))
        )
        assert torch.equal(ours, base)


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


def plain_statistics(hidden: Tensor, weight: Tensor, reference: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Entropy, and KL divergence from the reference."""
    logps = (hidden @ weight[:37].T).log_softmax(dim=-1)
    other = (reference[0] @ reference[1][:37].T).log_softmax(dim=-1)
    return -(logps.exp() * logps).sum(-1), (logps.exp() * (logps - other)).sum(-1)


@pytest.mark.parametrize("chunk", [1, 5, 100])
def test_entropy_and_kl(ranks: Ranks, chunk: int) -> None:
    hidden, weight, targets = inputs(23, torch.float64)
    other = [part.detach().roll(1, 0).requires_grad_() for part in (hidden, weight)]  # padding elsewhere, which is ignored
    ours = vocab_parallel_statistics(
        *(Head(hidden, weight), targets),
        **{"vocab_size": 37, "chunk": chunk, "tp_group": ranks.tensor, "entropy": True, "reference": Head(*other)},
    )
    assert ours.entropy is not None
    assert ours.kl is not None
    entropy, kl = plain_statistics(hidden, weight, (other[0].detach(), other[1].detach()))
    torch.testing.assert_close(ours.entropy, entropy)
    torch.testing.assert_close(ours.kl, kl)
    plain = (plain_logps(hidden, weight, targets), entropy, kl)
    coefficients = torch.randn(3, 23, dtype=torch.float64)
    pairs = [
        torch.autograd.grad(sum((c * part).sum() for c, part in zip(coefficients, parts, strict=True)), (hidden, weight))
        for parts in (ours, plain)
    ]
    for left, right in zip(*pairs, strict=True):
        torch.testing.assert_close(left, right)


def test_kl_from_itself_is_zero_and_the_reference_learns_nothing(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(7, torch.float64)
    other = [part.detach().clone().requires_grad_() for part in (hidden, weight)]
    kl = vocab_parallel_statistics(
        *(Head(hidden, weight), targets), vocab_size=37, chunk=3, tp_group=ranks.tensor, reference=Head(*other)
    ).kl
    assert kl is not None
    assert kl.abs().max() < 1e-14
    kl.sum().backward()
    assert all(part.grad is None for part in other)
    assert hidden.grad is not None
    assert hidden.grad.abs().max() < 1e-14


def test_entropy_of_a_uniform_and_of_a_certain_token(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(2, torch.float32)
    with torch.no_grad():
        hidden[0], weight[:] = 0.0, 0.0
        hidden[1], weight[5] = 10.0, 10.0  # one logit of 1600, the others 0
    entropy = vocab_parallel_statistics(
        Head(hidden, weight), targets, vocab_size=37, chunk=3, tp_group=ranks.tensor, entropy=True
    ).entropy
    assert entropy is not None
    assert entropy.tolist() == pytest.approx([math.log(37), 0.0])
    entropy.sum().backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("announce", [False, True])
def test_gradient_goes_into_a_buffer(ranks: Ranks, announce: bool) -> None:
    hidden, weight, targets = inputs(23, torch.float64)
    coefficients = torch.randn(23, dtype=torch.float64)
    buffer = torch.zeros_like(weight)
    settings = {"vocab_size": 37, "chunk": 5, "tp_group": ranks.tensor}
    for _ in range(2):  # two rows add up
        logps = vocab_parallel_logps(hidden, weight, targets, gradient=WeightGradient(buffer, announce), **settings)
        (logps * coefficients).sum().backward()
    plain = torch.autograd.grad(
        (plain_logps(hidden, weight, targets) * coefficients).sum(), (hidden, weight), materialize_grads=True
    )
    torch.testing.assert_close(hidden.grad, 2 * plain[0])
    torch.testing.assert_close(buffer, 2 * plain[1])
    assert (weight.grad is not None) == announce
    assert getattr(weight, "grad_added_to_main_grad", False) == announce


def test_buffer_is_not_rounded(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(23, torch.bfloat16)
    buffer = torch.zeros_like(weight, dtype=torch.float32)
    settings = {"vocab_size": 37, "chunk": 8, "tp_group": ranks.tensor}
    vocab_parallel_logps(hidden, weight, targets, gradient=WeightGradient(buffer, False), **settings).sum().backward()
    rounded = torch.autograd.grad(vocab_parallel_logps(hidden, weight, targets, **settings).sum(), weight)[0]
    assert torch.equal(buffer.bfloat16(), rounded)
    assert not torch.equal(buffer, rounded.float())


def test_a_frozen_weight_costs_no_gradient(ranks: Ranks) -> None:
    hidden, weight, targets = inputs(7, torch.float64)
    weight.requires_grad_(False)
    vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=3, tp_group=ranks.tensor).sum().backward()
    assert weight.grad is None
    torch.testing.assert_close(hidden.grad, torch.autograd.grad(plain_logps(hidden, weight, targets).sum(), hidden)[0])


@pytest.mark.parametrize("size", [1e4, 1e6])
def test_large_logits(ranks: Ranks, size: float) -> None:
    hidden, weight, targets = inputs(23, torch.float32)
    with torch.no_grad():
        hidden *= size / (hidden @ weight.T).abs().max()
    ours = vocab_parallel_logps(hidden, weight, targets, vocab_size=37, chunk=5, tp_group=ranks.tensor)
    exact_hidden, exact_weight = (part.detach().double().requires_grad_() for part in (hidden, weight))
    exact = plain_logps(exact_hidden, exact_weight, targets)
    assert exact.min() < -size / 10
    assert (ours - exact).abs().max() <= 1e-6 * size  # float32 logits, a few roundings of 6e-8
    gradients = torch.autograd.grad(ours.sum(), (hidden, weight))
    for left, right in zip(gradients, torch.autograd.grad(exact.sum(), (exact_hidden, exact_weight)), strict=True):
        torch.testing.assert_close(left.double(), right, rtol=1e-3, atol=1e-3 * float(right.abs().max()))


class Largest(TorchDispatchMode):
    """The size of the largest tensor created by any operation, in elements."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numbers = max(self.numbers, *(leaf.numel() for leaf in tree_leaves(out) if isinstance(leaf, Tensor)), 0)
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_larger_than_a_chunk_of_logits(ranks: Ranks, dtype: torch.dtype) -> None:
    num_tokens, chunk, padded = 100, 20, 48
    hidden, weight, targets = inputs(num_tokens, dtype)
    other = (hidden.detach().roll(1, 0), weight.detach())
    with Largest() as largest:
        found = vocab_parallel_statistics(
            Head(hidden, weight), targets, vocab_size=37, chunk=chunk, tp_group=ranks.tensor, entropy=True, reference=Head(*other)
        )
        torch.stack([part for part in found if part is not None]).sum().backward()
    assert hidden.numel() <= largest.numbers
    assert largest.numbers == max(hidden.numel(), chunk * padded, weight.numel()) < num_tokens * padded / 2


@pytest.mark.distributed
def test_vocabulary_over_two_ranks() -> None:
    run_ranks(2, "tests.unit.model.logprobs_worker", [])


def test_gradient_of_logits_is_the_same_compiled() -> None:
    """The GPU's path, which adds at the targets differently."""
    logits, (entropy, grad_logps, grad_entropy) = torch.randn(7, 33), torch.randn(3, 7).unbind()
    targets = (torch.randint(33, (7,)), torch.arange(7) % 3 > 0)
    arguments = (logits, targets, logits.logsumexp(-1), grad_logps, _Extras((grad_entropy, entropy), None))
    compiled = torch.compile(differentiate_logits, backend="aot_eager", dynamic=True, fullgraph=True)
    torch.testing.assert_close(compiled(*arguments), differentiate_logits(*arguments))

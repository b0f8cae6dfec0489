"""On a GPU: the compiled chunk loop gives the numbers of plain torch, in a fraction of the memory of all logits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpo_megatron.model.logprobs import Head, WeightGradient, vocab_parallel_statistics
from mpo_megatron.model.parallel import Ranks

pytestmark = pytest.mark.gpu

VOCAB, PADDED = 1000, 1024


def draw(num_tokens: int, hidden: int, vocab: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    states = torch.randn(num_tokens, hidden, generator=generator, device="cuda", dtype=dtype)
    weight = 0.05 * torch.randn(vocab, hidden, generator=generator, device="cuda", dtype=dtype)
    targets = torch.randint(0, min(VOCAB, vocab), (num_tokens,), generator=generator, device="cuda")
    return states.requires_grad_(), weight.requires_grad_(), targets


# Float32 sums in another order; bf16 rounds logits of up to about 5 by 2^-9 of that.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_statistics_equal_plain_torch(ranks: Ranks, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, targets = draw(300, 64, PADDED, dtype)
    other = (hidden.detach().roll(1, 0), weight.detach().roll(1, 0))
    ours = vocab_parallel_statistics(
        Head(hidden, weight), targets, vocab_size=VOCAB, chunk=128, tp_group=ranks.tensor, entropy=True, reference=Head(*other)
    )
    exact_hidden, exact_weight = (part.detach().double().requires_grad_() for part in (hidden, weight))
    logps = (exact_hidden @ exact_weight[:VOCAB].T).log_softmax(dim=-1)
    reference = (other[0].double() @ other[1][:VOCAB].double().T).log_softmax(dim=-1)
    exact = (
        logps.gather(1, targets[:, None]).squeeze(1),
        -(logps.exp() * logps).sum(-1),
        (logps.exp() * (logps - reference)).sum(-1),
    )
    for left, right in zip(ours, exact, strict=True):
        assert left is not None
        assert (left.double() - right).abs().max() <= tolerance
    total = sum(part.double().sum() for part in ours if part is not None)
    left = torch.autograd.grad(total, (hidden, weight))
    right = torch.autograd.grad(sum(part.sum() for part in exact), (exact_hidden, exact_weight))
    for mine, theirs in zip(left, right, strict=True):
        assert (mine.double() - theirs).abs().max() <= tolerance * theirs.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradient_goes_into_a_part_of_a_larger_buffer(ranks: Ranks, dtype: torch.dtype) -> None:
    """Like Megatron's gradient buffers: one long tensor, with a slice for each weight."""
    hidden, weight, targets = draw(300, 64, PADDED, dtype)
    whole = torch.zeros(weight.numel() + 200, device="cuda")
    buffer = whole[100:-100].view_as(weight)
    settings = {"vocab_size": VOCAB, "chunk": 128, "tp_group": ranks.tensor}
    for _ in range(2):
        vocab_parallel_statistics(
            Head(hidden, weight), targets, gradient=WeightGradient(buffer, False), **settings
        ).logps.sum().backward()
    assert weight.grad is None
    expected = torch.autograd.grad(vocab_parallel_statistics(Head(hidden, weight), targets, **settings).logps.sum(), weight)[0]
    torch.testing.assert_close(buffer, 2 * expected.float(), rtol=2e-2, atol=1e-3 * float(expected.abs().max()))
    assert whole[:100].abs().max() == whole[-100:].abs().max() == 0


def test_peak_memory_is_that_of_a_chunk_and_the_weights_gradient(ranks: Ranks) -> None:
    num_tokens, vocab, chunk = 16384, 151936, 512
    hidden, weight, targets = draw(num_tokens, 256, vocab, torch.bfloat16)

    def step() -> None:
        vocab_parallel_statistics(
            Head(hidden, weight), targets, vocab_size=vocab, chunk=chunk, tp_group=ranks.tensor
        ).logps.sum().backward()

    step()  # compiles
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    gradients = weight.numel() * (4 + 2) + hidden.numel() * 2
    of_a_chunk = chunk * vocab * (2 + 2 + 4)  # logits, their gradient, and float32 between
    assert torch.cuda.max_memory_allocated() - before <= 1.2 * (gradients + of_a_chunk)
    assert of_a_chunk <= 0.13 * num_tokens * vocab * 2  # full logits, in bf16 and without their softmax

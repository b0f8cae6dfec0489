"""One of two ranks that share a vocabulary: values and gradients equal those of plain torch over the whole vocabulary."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed import all_reduce

from mpo_megatron.config import ParallelConfig
from mpo_megatron.model.logprobs import Head, vocab_parallel_statistics
from mpo_megatron.model.parallel import Ranks, model_parallel

PADDED = 48


def main() -> None:
    with model_parallel(ParallelConfig(tensor=2), seed=1) as ranks:
        for vocab in (48, 37, 24, 20):  # no padding, uneven parts, one rank that has only padding, and one partly
            for chunk in (4, 100):
                check(vocab, chunk, ranks)


def check(vocab: int, chunk: int, ranks: Ranks) -> None:
    generator = torch.Generator().manual_seed(vocab)
    hidden, other_hidden = (torch.randn(23, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    weight, other_weight = (torch.randn(PADDED, 16, generator=generator, dtype=torch.float64) for _ in range(2))
    targets = torch.randint(0, vocab, (23,), generator=generator)
    coefficients = torch.randn(3, 23, generator=generator, dtype=torch.float64)
    own = slice(ranks.tensor.rank() * PADDED // 2, (ranks.tensor.rank() + 1) * PADDED // 2)

    narrow, up = (torch.randn(rows, 3, generator=generator, dtype=torch.float64).requires_grad_() for rows in (23, PADDED))
    hidden.requires_grad_()
    weight.requires_grad_()
    logps = (hidden @ weight[:vocab].T + narrow @ up[:vocab].T).log_softmax(dim=-1)
    other = (other_hidden @ other_weight[:vocab].T).log_softmax(dim=-1)
    plain = (
        logps.gather(1, targets[:, None]).squeeze(1),
        -(logps.exp() * logps).sum(-1),
        (logps.exp() * (logps - other)).sum(-1),
    )
    expected = torch.autograd.grad(weighted(plain, coefficients), (hidden, narrow, weight, up))

    shard, up_shard = (matrix[own].detach().requires_grad_() for matrix in (weight, up))
    ours = vocab_parallel_statistics(
        *(Head(hidden, shard, narrow, up_shard), targets),
        vocab_size=vocab,
        chunk=chunk,
        tp_group=ranks.tensor,
        entropy=True,
        reference=Head(other_hidden, other_weight[own]),
    )
    for left, right in zip(ours, plain, strict=True):
        assert left is not None
        torch.testing.assert_close(left, right)
    found = torch.autograd.grad(weighted(ours, coefficients), (hidden, narrow, shard, up_shard))
    for whole, gradient in zip(found[:2], expected[:2], strict=True):
        all_reduce(whole, group=ranks.tensor)  # each rank has its vocabulary's part
        torch.testing.assert_close(whole, gradient)
    for sharded, gradient in zip(found[2:], expected[2:], strict=True):
        torch.testing.assert_close(sharded, gradient[own])


def weighted(parts: tuple[Tensor | None, ...], coefficients: Tensor) -> Tensor:
    return torch.stack([part for part in parts if part is not None]).mul(coefficients).sum()


if __name__ == "__main__":
    main()

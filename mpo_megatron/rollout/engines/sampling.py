"""From logits to tokens, with one source of randomness per response: temperature, top-k, top-p, and inverse-CDF sampling.

A response's randomness is a row of numbers in [0, 1), drawn beforehand from its own seed. Token t is where the cumulative
probability passes number t. The batch and the device of a response change only rounding.

Shapes: N rows (responses), T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**20
"""Logits processed at a time: their float64 copies fit into a processor's cache."""


def draw_uniforms(seeds: Sequence[int], num_tokens: int) -> Tensor:
    """[N, T] float64 in [0, 1): row n from a generator seeded with `seeds[n]`."""
    rows = [torch.rand(num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    return torch.stack(rows)


def filter_logits(logits: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits [N, V] of the distribution to draw from, float32: −∞ for excluded tokens.

    Args:
        logits: [N, V] from the model
        temperature: positive; divides the logits first
        top_k: the number of likeliest tokens to keep (ties with the last one stay too); 0 keeps all
        top_p: of these, keep the fewest likeliest tokens whose probabilities reach this sum, at least one
    """
    logits = logits.float() / temperature  # float32: 10⁵ probabilities are summed
    if 0 < top_k < logits.shape[-1]:
        threshold = logits.topk(top_k, dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if top_p < 1.0:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(dim=-1)
        before = probabilities.cumsum(dim=-1) - probabilities  # sum over likelier tokens: 0 for the first, so it always stays
        out = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, order, before >= top_p)
        logits = logits.masked_fill(out, float("-inf"))
    return logits


def draw_tokens(logits: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [N] drawn from softmax(logits [N, V]) with the numbers `uniforms` [N] in [0, 1).

    The token is the first whose cumulative probability exceeds the number.
    """
    cumulated = logits.double().softmax(dim=-1).cumsum(dim=-1)  # float64: 10⁵ terms, and the last sum must be 1
    target = uniforms.to(cumulated.device).unsqueeze(-1) * cumulated[:, -1:]
    tokens = torch.searchsorted(cumulated, target, right=True).squeeze(-1)
    # Rounding can make the product equal the last sum: then take the last token with a positive probability.
    last = torch.searchsorted(cumulated, cumulated[:, -1:].contiguous()).squeeze(-1)
    return torch.minimum(tokens, last)


def choose_tokens(logits: Tensor, uniforms: Tensor, *, temperature: float, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Next tokens [N]: the likeliest at temperature 0, else drawn from the filtered distribution."""
    if temperature == 0:
        return logits.argmax(dim=-1)
    rows = max(1, CHUNK_ELEMENTS // logits.shape[-1])
    drawn = [
        draw_tokens(filter_logits(chunk, temperature=temperature, top_k=top_k, top_p=top_p), numbers)
        for chunk, numbers in zip(logits.split(rows), uniforms.split(rows), strict=True)
    ]
    return torch.cat(drawn)

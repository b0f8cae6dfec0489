"""With any packing, groups of any shape have the log-probs and gradients of each response in a separate row."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import Qwen3Config

from mpo_megatron.config import ModelConfig, ParallelConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import RowShape, group_table, pack
from mpo_megatron.data.packing import Piece, Row, build_row
from mpo_megatron.families import read_family
from mpo_megatron.model import attention_backends, attention_varlen
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.schedule import RowTensors
from mpo_megatron.train.step import collect_logps, run_rows, sum_responses, token_index
from tests.tiny import random_groups
from tests.unit.model.rows import plain_varlen_kernel

CONFIG = Qwen3Config(
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 16, "vocab_size": 251, "max_position_embeddings": 512},
)
PADDED_VOCAB = 256
SHAPE = RowShape(row_tokens=1000, layout="shared", multiple=16, num_replicas=1, replica=0, pair_weight=0.0)


def build(ranks: Ranks, attention: str = "auto") -> list[torch.nn.Module]:
    """The same weights each time; norms near 1."""
    config = ModelConfig(checkpoint="", precision="fp32", attention=attention, logprob_chunk=7)
    parts = build_policy(read_family(CONFIG), config, ParallelConfig(), ranks, PADDED_VOCAB)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in parts[0].parameters():
            parameter.copy_((parameter.dim() == 1) + 0.1 * torch.randn(parameter.shape, generator=generator))
    return parts


def draw_groups(seed: int) -> list[TokenizedGroup]:
    """Five groups with 1 … 16 responses, prompts of zero or more tokens, many responses of one."""
    rng = np.random.default_rng(seed)
    groups = []
    for index in range(5):
        (group,) = random_groups(1, seed=100 * seed + index, max_responses=16, prompt_tokens=(0, 20), response_tokens=(1, 9))
        keep = 1 if index == 0 else len(group.response_tokens)
        short = rng.random(keep) < 0.3
        responses = tuple(tokens[:1] if cut else tokens for tokens, cut in zip(group.response_tokens, short, strict=False))
        prompt = group.prompt_tokens[:0] if index == 1 else group.prompt_tokens
        groups.append(dataclasses.replace(group, prompt_tokens=prompt, response_tokens=responses, rewards=np.zeros(keep)))
    return groups


def compute(
    parts: list[torch.nn.Module], rows: Sequence[Row], coefficients: Tensor, ranks: Ranks
) -> tuple[Tensor, dict[str, Tensor]]:
    """log π of every response [G, K], and gradients of their sum weighted by `coefficients`."""

    def row_loss(row: RowTensors, token_logps: Tensor, token_kl: Tensor | None) -> Tensor:
        return (coefficients[row.responses[:, 0], row.responses[:, 1]] * sum_responses(row, token_logps)).sum()

    logps = collect_logps(run_rows(parts, rows, ranks, row_loss), tuple(coefficients.shape), ranks).response
    gradients = {}
    for name, parameter in parts[0].named_parameters():
        assert parameter.grad is not None
        gradients[name], parameter.grad = parameter.grad, None
    return logps, gradients


@pytest.mark.parametrize("seed", range(4))
def test_packed_as_alone(ranks: Ranks, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(attention_backends, "_missing", lambda model: None)
    monkeypatch.setattr(attention_varlen, "find_kernel", lambda: plain_varlen_kernel)
    groups = draw_groups(seed)
    table = group_table(groups, np.arange(len(groups)))
    coefficients = torch.from_numpy(np.random.default_rng(seed).normal(size=table.valid.shape))
    alone = [
        build_row([Piece(slot, (k,), 0, 0)], groups, layout="unshared", multiple=1)
        for slot, k in np.argwhere(table.valid).tolist()
    ]
    expected, expected_gradients = compute(build(ranks), alone, coefficients, ranks)
    assert (expected[torch.from_numpy(table.valid & (table.lengths > 1))] < 0).all()
    for attention in ("sdpa", "varlen"):
        parts = build(ranks, attention)
        for layout, row_tokens in (("shared", 30), ("shared", 90), ("shared", 1000), ("unshared", 90)):
            shape = dataclasses.replace(SHAPE, row_tokens=row_tokens, layout=layout)
            _, rows = pack(table, groups, table.valid, shape)
            logps, gradients = compute(parts, rows, coefficients, ranks)
            # Float32 sums of some hundred terms in another order; log-probs are sums of up to 9 of about −6.
            torch.testing.assert_close(logps, expected, rtol=1e-5, atol=1e-5)
            for name, gradient in gradients.items():
                wanted = expected_gradients[name]
                assert (gradient - wanted).abs().max() <= 1e-5 * wanted.abs().max(), (name, attention, layout, row_tokens)


def test_tokens_that_the_model_did_not_generate_contribute_nothing(ranks: Ranks) -> None:
    """Log-probs and gradients of masked responses are those of the scored tokens only, each in its whole context."""
    groups = draw_groups(3)
    rng = np.random.default_rng(3)
    masks = [tuple(rng.random(len(ids)) < 0.5 for ids in group.response_tokens) for group in groups]
    for slot, group in enumerate(groups):
        for k in range(group.num_responses):
            masks[slot][k][-1] = True
    masked = [dataclasses.replace(group, scored=mask) for group, mask in zip(groups, masks, strict=True)]
    table = group_table(masked, np.arange(len(groups)))
    shape = table.valid.shape
    weight = torch.zeros(*shape, int(table.lengths.max()), dtype=torch.float64)  # of each token, in the unmasked rows
    for slot, group in enumerate(groups):
        for k, mask in enumerate(masks[slot]):
            scored = mask if len(group.prompt_tokens) else mask[1:]
            weight[slot, k, : len(scored)] = torch.from_numpy(scored)

    def token_loss(row: RowTensors, token_logps: Tensor, token_kl: Tensor | None) -> Tensor:
        return (weight[token_index(row)] * token_logps).sum()

    parts = build(ranks)
    _, rows = pack(table, groups, table.valid, SHAPE)
    outputs = run_rows(parts, rows, ranks, token_loss)
    token = collect_logps(outputs, shape, ranks, weight.shape[2]).token
    assert token is not None
    wanted_gradients = {name: parameter.grad for name, parameter in parts[0].named_parameters()}
    for parameter in parts[0].parameters():
        parameter.grad = None
    _, rows = pack(table, masked, table.valid, SHAPE)
    logps, gradients = compute(parts, rows, torch.ones(shape), ranks)
    # Sums of up to 9 float32 numbers of about −6.
    torch.testing.assert_close(logps, (weight * token).sum(dim=-1), rtol=1e-5, atol=1e-5)
    for name, gradient in gradients.items():
        assert (gradient - wanted_gradients[name]).abs().max() <= 1e-5 * gradient.abs().max(), name


def test_siblings_and_neighbours_change_no_bit(ranks: Ranks) -> None:
    parts, groups = build(ranks), draw_groups(7)
    table = group_table(groups, np.arange(len(groups)))
    others = [
        dataclasses.replace(
            group,
            prompt_tokens=group.prompt_tokens if slot == 2 else group.prompt_tokens[::-1].copy(),
            response_tokens=tuple(
                tokens if (slot, k) == (2, 1) else (tokens + 1) % 250 for k, tokens in enumerate(group.response_tokens)
            ),
        )
        for slot, group in enumerate(groups)
    ]
    found = []
    for changed in (groups, others):
        _, rows = pack(table, changed, table.valid, SHAPE)
        assert len(rows) == 1
        found.append(compute(parts, rows, torch.ones(table.valid.shape), ranks)[0])
    assert found[0][2, 1] == found[1][2, 1] != 0
    assert (found[0] != found[1]).sum() > 10

"""A model with Gated DeltaNets on packed rows, against `transformers` on each response alone: log-probs and every gradient.

Float32 has rounding errors of its own, and decays are exponentials of float32 sums. So both are compared with `transformers` in
float64, and the tolerance is `RATIO` times the error of `transformers` in float32.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ModelConfig, ParallelConfig
from mpo_megatron.data.group import TokenizedGroup
from mpo_megatron.data.loader import RowShape, group_table, pack
from mpo_megatron.data.packing import Piece, Row, build_row
from mpo_megatron.families import Family, load_family
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.checkpoints.checkpoint import load_weights
from mpo_megatron.train.schedule import RowTensors
from mpo_megatron.train.step import collect_logps, run_rows, sum_responses
from tests.float64 import Float64
from tests.unit.model.adapted import save_base

RATIO = 4.0
"""Ours sums in another order: over chunks of a row, over heads at once, and up to the group's shared prompt."""
FLOOR = 1e-2
"""A tensor's error is relative to its largest value, or to this share of the largest of all: see tests/distributed/parity.py."""
CHUNK = 16
"""`model.delta_chunk`."""
LENGTHS: list[tuple[int, list[int]]] = [
    (0, [5, 1]),
    (1, [1, CHUNK]),
    (CHUNK - 1, [1] * 16),
    (CHUNK, [CHUNK + 1, 1, 2]),
    (CHUNK + 1, [CHUNK - 1]),
    (2 * CHUNK, [1, 2 * CHUNK + 1]),
    (2 * CHUNK + 2, [7, 7, 3]),
]
"""Tokens of each group's prompt, and of its responses: 1 to 16, around the rule's chunk."""


def draw_groups(lengths: Sequence[tuple[int, Sequence[int]]] = LENGTHS) -> list[TokenizedGroup]:
    rng = np.random.default_rng(0)

    def tokens(number: int) -> np.ndarray[Any, np.dtype[np.int32]]:
        return rng.integers(0, 250, number).astype(np.int32)

    return [
        TokenizedGroup(
            group_id=str(index),
            prompt_tokens=tokens(prompt),
            response_tokens=tuple(tokens(number) for number in responses),
            rewards=np.zeros(len(responses)),
        )
        for index, (prompt, responses) in enumerate(lengths)
    ]


@dataclass(frozen=True)
class Found:
    """Log π of every response [G, K], 0 where there is none, and gradients of their sum weighted by coefficients."""

    logps: Tensor
    gradients: dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class World:
    """Our model, and what `transformers` finds."""

    ranks: Ranks
    parts: list[torch.nn.Module]
    live: LiveWeights
    groups: list[TokenizedGroup]
    coefficients: Tensor
    exact: Found
    rounded: Found

    def compute(self, rows: Sequence[Row], coefficients: Tensor) -> Found:
        """Ours, for these rows."""

        def row_loss(row: RowTensors, token_logps: Tensor, token_kl: Tensor | None) -> Tensor:
            return (coefficients[row.responses[:, 0], row.responses[:, 1]] * sum_responses(row, token_logps)).sum()

        for parameter in self.parts[0].parameters():
            parameter.grad = None
        outputs = run_rows(self.parts, rows, self.ranks, row_loss)
        logps = collect_logps(outputs, tuple(coefficients.shape), self.ranks).response
        weights = {parameter: parameter.data for parameter in self.parts[0].parameters()}
        for parameter in weights:  # in the place of the weights, gradients have the weights' names
            assert parameter.grad is not None
            parameter.data = parameter.grad
        gradients = {name: tensor.double() for name, tensor in self.live.stream()}
        for parameter, weight in weights.items():
            parameter.data = weight
        return Found(logps, gradients)


def by_transformers(folder: Path, groups: Sequence[TokenizedGroup], coefficients: Tensor, dtype: torch.dtype) -> Found:
    """Each response alone, after its own copy of the prompt."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    logps = torch.zeros(coefficients.shape, dtype=torch.float64)
    for slot, group in enumerate(groups):
        for k, response in enumerate(group.response_tokens):
            tokens = torch.from_numpy(np.concatenate((group.prompt_tokens, response)).astype(np.int64))
            predicted = model(tokens[None]).logits[0, :-1].log_softmax(dim=-1).gather(1, tokens[1:, None])[:, 0]
            logp = predicted[max(len(group.prompt_tokens) - 1, 0) :].sum()
            logps[slot, k] = logp.detach()
            if logp.requires_grad:
                (coefficients[slot, k] * logp).backward()
    return Found(logps, {name: weight.grad.double() for name, weight in model.named_parameters()})


@pytest.fixture(scope="module")
def world(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = save_base(tmp_path_factory.mktemp("hybrid"), model_type="qwen3_5_text")
    family: Family = load_family(folder / "hf")
    padded = load_conversion(folder / "megatron").padded_vocab_size
    model = ModelConfig(checkpoint="", precision="fp32", delta_chunk=CHUNK)
    parts = build_policy(family, model, ParallelConfig(), ranks, padded)
    load_weights(parts, folder / "megatron", ranks)
    groups = draw_groups()
    valid = group_table(groups, np.arange(len(groups))).valid
    coefficients = torch.from_numpy(np.random.default_rng(1).normal(size=valid.shape))
    rounded = by_transformers(folder / "hf", groups, coefficients, torch.float32)
    with Float64():
        exact = by_transformers(folder / "hf", groups, coefficients, torch.float64)
    live = LiveWeights.of_policy(parts, family, padded, ranks)
    return World(ranks=ranks, parts=parts, live=live, groups=groups, coefficients=coefficients, exact=exact, rounded=rounded)


def largest_errors(found: Found, exact: Found) -> tuple[float, float]:
    """Of the log-probs and of the gradients, relative to the largest value."""
    largest = max(float(tensor.abs().max()) for tensor in exact.gradients.values())
    assert found.gradients.keys() == exact.gradients.keys()
    gradient = max(
        float((found.gradients[name] - tensor).abs().max()) / max(float(tensor.abs().max()), FLOOR * largest)
        for name, tensor in exact.gradients.items()
    )
    return float((found.logps - exact.logps).abs().max() / exact.logps.abs().max()), gradient


def build_rows(groups: Sequence[TokenizedGroup], layout: str, row_tokens: int) -> list[Row]:
    table = group_table(groups, np.arange(len(groups)))
    if layout == "padded":
        longest = max(len(group.prompt_tokens) + max(map(len, group.response_tokens)) for group in groups)
        return [
            build_row([Piece(slot, (k,), 0, 0)], groups, layout="unshared", multiple=longest)
            for slot, k in np.argwhere(table.valid).tolist()
        ]
    shape = RowShape(row_tokens=1000, layout="shared", multiple=16, num_replicas=1, replica=0, pair_weight=0.0)
    _, rows = pack(table, groups, table.valid, dataclasses.replace(shape, row_tokens=row_tokens, layout=layout))  # type: ignore[arg-type]
    return rows


@pytest.mark.parametrize(("layout", "row_tokens"), [("shared", 2048), ("shared", 272), ("unshared", 600), ("padded", 0)])
def test_every_layout_has_the_log_probs_and_gradients_of_transformers(world: World, layout: str, row_tokens: int) -> None:
    ours = world.compute(build_rows(world.groups, layout, row_tokens), world.coefficients)
    errors, allowed = largest_errors(ours, world.exact), largest_errors(world.rounded, world.exact)
    assert all(error <= RATIO * limit for error, limit in zip(errors, allowed, strict=True)), (errors, allowed)
    assert max(allowed) <= 5e-5, allowed  # 2⁻²⁴ times a few hundred: an oracle that is off by more proves nothing


def test_siblings_and_neighbours_change_no_bit(world: World) -> None:
    others = [
        dataclasses.replace(
            group,
            prompt_tokens=group.prompt_tokens if slot == 3 else group.prompt_tokens[::-1].copy(),
            response_tokens=tuple(
                tokens if (slot, k) == (3, 0) else (tokens + 1) % 250 for k, tokens in enumerate(group.response_tokens)
            ),
        )
        for slot, group in enumerate(world.groups)
    ]
    found = []
    for groups in (world.groups, others):
        rows = build_rows(groups, "shared", 2048)
        assert len(rows) == 1
        found.append(world.compute(rows, world.coefficients).logps)
    assert found[0][3, 0] == found[1][3, 0] != 0
    assert (found[0] != found[1]).sum() > 10

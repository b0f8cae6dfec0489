"""A step's rows are queued without the host waiting: each wait would let a GPU idle."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Qwen3Config

from mpo_megatron.config import LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.families import read_family
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train import optimizer
from mpo_megatron.train.objective import Objective, build_objective
from mpo_megatron.train.step import forward_step, fused_step, prepare_schedules, two_phase_step
from tests.tiny import random_groups

CONFIG = Qwen3Config(
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1},
    **{"head_dim": 16, "vocab_size": 256, "max_position_embeddings": 512},
)
GROUPS = random_groups(12, seed=3, tied_share=0.0)


class Waits(TorchDispatchMode):
    """Counts operations whose result, or its shape, depends on tensor values: the host would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tags = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
        by_mask = "index" in func.name() and any(
            isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in tree_leaves(args[1])
        )
        if by_mask or (tags & set(func.tags) and not func.name().startswith("aten::index.")):
            self.found[func.name()] += 1
        return func(*args, **(kwargs or {}))


def count_waits(objective: Objective, ranks: Ranks, row_tokens: int, *, two_phase: bool) -> tuple[int, Counter[str]]:
    """Rows of a step, and its waits."""
    parts = build_policy(read_family(CONFIG), ModelConfig(checkpoint="", precision="fp32"), ParallelConfig(), ranks, 256)
    model: list[Any] = optimizer.wrap_data_parallel(parts, OptimizerConfig(), ranks)
    prepare_schedules(model)
    shape = RowShape(row_tokens=row_tokens, layout="shared", multiple=16, num_replicas=1, replica=0, pair_weight=1e-3)
    data: Any = GROUPS
    batch = build_step(0, data, np.arange(len(GROUPS)), objective.select, shape)
    reference = forward_step(model, batch, objective, ranks)
    with Waits() as waits:
        if two_phase:
            two_phase_step(model, batch, reference, objective, ranks, shape, torch.Generator())
        else:
            fused_step(model, batch, reference, objective, ranks)
    return len(batch.rows), waits.found


@pytest.mark.parametrize(("name", "two_phase"), [("mpo", False), ("mpo", True), ("grpo_offline", False), ("grpo_offline", True)])
def test_no_row_waits(ranks: Ranks, name: str, two_phase: bool) -> None:
    objective = build_objective(LossConfig(name=name))
    (one, expected), (several, found) = (count_waits(objective, ranks, size, two_phase=two_phase) for size in (4096, 160))
    assert one == 1
    assert several > 4
    assert found == expected
    assert not found, found


def test_waits_are_seen() -> None:
    with Waits() as waits:
        values = torch.arange(4.0)
        values[values > 1], values.nonzero(), float(values[0]), values.unique()
    assert sum(waits.found.values()) == 4, waits.found

"""Small models with random weights and a step of random groups, for tests on a GPU."""

from __future__ import annotations

import math
import zlib
from typing import Any, cast

import numpy as np
import torch
from transformers import Qwen3_5TextConfig, Qwen3Config

from mpo_megatron.config import LossConfig, ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, StepBatch, build_step
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.families import Family, read_family
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.hf.fp8 import token_multiple
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.precision import keep_exact_weights
from mpo_megatron.train import optimizer
from mpo_megatron.train.objective import Logps, build_objective, group_batch
from mpo_megatron.train.step import prepare_schedules
from tests.tiny import random_groups

VOCAB = 1000
OBJECTIVE = build_objective(LossConfig(name="mpo", params={"beta": 0.1}))
GROUPS = cast(PreparedGroups, random_groups(16, seed=1, vocab_size=VOCAB, prompt_tokens=(20, 90), response_tokens=(1, 80)))


def family(**changes: Any) -> Family:
    """Every side of every matrix is a multiple of 128, as every recipe requires."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    return read_family(Qwen3Config(**{**sizes, "num_key_value_heads": 4, "head_dim": 64, "vocab_size": VOCAB, **changes}))


def hybrid() -> Family:
    """Three Gated DeltaNets and one layer of attention, of the same sizes."""
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 4, "num_attention_heads": 8}
    net = {"linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 128, "linear_value_head_dim": 128}
    return read_family(Qwen3_5TextConfig(**sizes, **net, num_key_value_heads=4, head_dim=64, vocab_size=VOCAB))


def model_config(**options: Any) -> ModelConfig:
    return ModelConfig(checkpoint="random", **options)


def row_shape(config: ModelConfig) -> RowShape:
    return RowShape(
        row_tokens=1024,
        layout="shared",
        multiple=token_multiple(config),
        num_replicas=1,
        replica=0,
        pair_weight=1e-3,
    )


def build(
    config: ModelConfig, ranks: Ranks, *, model: Family | None = None, adapter: Adapter | None = None, **changes: Any
) -> list[torch.nn.Module]:
    """The policy in this precision; a weight has the same values in every policy that has it."""
    parts = build_policy(model or family(**changes), config, ParallelConfig(), ranks, 1024, adapter)
    values = {}
    with torch.no_grad():
        for name, parameter in plain_names(parts[0]).items():
            values[parameter] = start_value(name, parameter.shape).to(parameter.dtype)
            parameter.copy_(values[parameter].to(parameter.device))  # to FP8 from bf16, as checkpoints are loaded
    keep_exact_weights(parts[0], {name: values[parameter] for name, parameter in parts[0].named_parameters()})
    return parts


def start_value(name: str, shape: torch.Size) -> torch.Tensor:
    """Random matrices; norms of 1, biases of 0, and decays that keep a state for some tokens."""
    if len(shape) > 1:
        return 0.05 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
    return torch.full(shape, -2.0 if name.endswith("A_log") else 0.0 if name.endswith("bias") else 1.0)


def plain_names(part: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Parameters by names that are common to all layer implementations."""
    moved = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    }
    named = {}
    for name, parameter in part.named_parameters():
        for theirs, ours in moved.items():
            name = name.replace(theirs, ours)
        named[name.removeprefix("module.")] = parameter  # Float16Module's
    return named


def batch(config: ModelConfig) -> StepBatch:
    built = build_step(0, GROUPS, np.arange(len(GROUPS)), OBJECTIVE.select, row_shape(config))
    assert len(built.rows) > 1
    return built


def wrap(parts: list[torch.nn.Module], ranks: Ranks) -> tuple[list[torch.nn.Module], Any]:
    settings = OptimizerConfig(lr=1e-4)
    model = optimizer.wrap_data_parallel(parts, settings, ranks)
    prepare_schedules(model)
    return model, optimizer.build_optimizer(settings, model, ranks)


def mean_loss(step: StepBatch, policy: Logps, reference: Logps) -> float:
    losses = OBJECTIVE.compute(group_batch(step.table, policy, reference))
    return float(losses.sum() / int(step.contributes.sum()))


def first_loss(step: StepBatch) -> float:
    """ln(K / |Y+|), averaged over the groups with a contrast."""
    assert step.table.rewards is not None
    values = [
        math.log(valid.sum() / (rewards[valid] > rewards[valid].mean()).sum())
        for rewards, valid, counts in zip(step.table.rewards, step.table.valid, step.contributes, strict=True)
        if counts
    ]
    return float(np.mean(values))


def per_token(step: StepBatch, logps: Logps) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Mean log-prob of a token of each response."""
    valid = step.in_rows
    return logps.response.cpu().numpy()[valid] / step.table.lengths[valid]

"""Layouts that a model allows; others are refused with the field, the rule and valid values."""

from __future__ import annotations

import sys
from typing import Any

import pytest
from transformers import (
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from mpo_megatron import device
from mpo_megatron.config import ConfigError, OptimizerConfig, ParallelConfig
from mpo_megatron.config.parallel import check_ranks
from mpo_megatron.families import read_family
from mpo_megatron.hf.layout import validate_layout
from mpo_megatron.train import optimizer
from mpo_megatron.train.optimizer import check_offload

DENSE = Qwen3Config(num_attention_heads=40, num_key_value_heads=8, num_hidden_layers=4, intermediate_size=512)
EXPERTS = Qwen2MoeConfig(
    num_attention_heads=16,
    num_key_value_heads=16,
    num_hidden_layers=24,
    intermediate_size=5632,
    num_experts=60,
    moe_intermediate_size=1408,
    shared_expert_intermediate_size=5628,
)
HYBRID = Qwen3_5TextConfig(
    num_attention_heads=16, num_key_value_heads=8, linear_num_key_heads=4, linear_num_value_heads=8, num_hidden_layers=4
)
FAMILY = read_family(DENSE)


def test_heads_are_shared_out_whole() -> None:
    for layout in ({"context": 8}, {"context": 40}, {"tensor": 8, "context": 5}, {"tensor": 2, "context": 20}):
        validate_layout(read_family(DENSE), ParallelConfig(**layout), 1024)


@pytest.mark.parametrize(
    ("config", "layout", "message"),
    [
        (DENSE, {"context": 16}, "parallel.context = 16 cannot split the 40 attention heads and 8 key/value heads"),
        (
            HYBRID,
            {"tensor": 8},
            "parallel.tensor = 8 does not divide the model's linear_num_key_heads = 4; choose one of 1, 2, 4",
        ),
        (
            HYBRID,
            {"tensor": 2, "context": 4},
            "parallel.context = 4 does not divide the 2 key heads of linear_attention .* = 2; choose one of 1, 2",
        ),
        (DENSE, {"tensor": 2, "context": 5}, "20 attention heads and 4 key/value heads .* choose one of 1, 2, 4, 20"),
        (
            DENSE,
            {"pipeline": 3},
            "parallel.pipeline = 3 does not divide .* num_hidden_layers = 4; choose one of 1, 2, 4, or give",
        ),
        (
            DENSE,
            {"pipeline": 2, "virtual_pipeline": 4},
            "parallel.virtual_pipeline = 4 does not divide the 2 layers of stage 0 of parallel.pipeline = 2; choose one of 1, 2",
        ),
        (
            DENSE,
            {"pipeline": 3, "first_stage_layers": 1},
            "first_stage_layers = 1 leave 3 of num_hidden_layers = 4 layers for the other 2 stages .* a multiple of 2",
        ),
        (
            DENSE,
            {"pipeline": 2, "first_stage_layers": 1, "last_stage_layers": 2},
            "together 3 layers, but the model has num_hidden_layers = 4",
        ),
        (DENSE, {"expert": 2}, "parallel.expert = 2, but the model has no experts"),
        (
            EXPERTS,
            {"expert": 8},
            "parallel.expert = 8 does not divide the model's num_experts = 60; choose one of 1, 2, 3, 4, 5, 6",
        ),
        (EXPERTS, {"expert_tensor": 3}, "parallel.expert_tensor = 3 does not divide the model's moe_intermediate_size = 1408"),
        (EXPERTS, {"tensor": 8}, "parallel.tensor = 8 does not divide the model's shared_expert_intermediate_size = 5628"),
        (EXPERTS, {"tensor": 2, "sequence": False}, "every rank would send every token to the experts"),
    ],
)
def test_layouts_a_model_refuses(config: PretrainedConfig, layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        validate_layout(read_family(config), ParallelConfig(**layout), 1024)


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"virtual_pipeline": 2}, "parallel.virtual_pipeline = 2 needs parallel.pipeline > 1"),
        ({"last_stage_layers": 3}, "parallel.last_stage_layers = 3 needs parallel.pipeline > 1"),
        ({"pipeline": 2, "first_stage_layers": 0}, "a stage has at least 1 layer"),
        ({"expert": 0}, "parallel.expert = 0; it must be at least 1"),
        ({"sequence": True}, "parallel.sequence = true needs parallel.tensor > 1"),
    ],
)
def test_layouts_no_model_allows(layout: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ParallelConfig(**layout)


@pytest.mark.parametrize(
    ("layout", "world_size", "message"),
    [
        (
            {"tensor": 2, "pipeline": 2, "context": 2},
            12,
            "= 2 × 2 × 2 = 8 does not divide the number of ranks, 12; start a multiple of 8",
        ),
        (
            {"expert": 4, "pipeline": 2},
            12,
            "= 4 × 1 = 4 does not divide the 6 ranks of a pipeline stage .* product of 1, 2, 3, 6",
        ),
        ({"expert": 2, "expert_tensor": 2}, 2, "= 2 × 2 = 4 does not divide the 2 ranks"),
    ],
)
def test_layouts_that_do_not_divide_the_ranks(layout: dict[str, Any], world_size: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_ranks(ParallelConfig(**layout), world_size)


@pytest.mark.parametrize(
    ("num_layers", "layout", "expected"),
    [
        (48, {"pipeline": 4, "virtual_pipeline": 4}, (12, 12, 12, 12)),  # Qwen2.5-14B
        (64, {"pipeline": 8, "virtual_pipeline": 2}, (8,) * 8),  # Qwen2.5-32B
        (64, {"pipeline": 6, "first_stage_layers": 10, "last_stage_layers": 10}, (10, 11, 11, 11, 11, 10)),
        (40, {"pipeline": 3, "last_stage_layers": 12}, (14, 14, 12)),  # Qwen3-14B
        (5, {"pipeline": 2, "first_stage_layers": 2, "last_stage_layers": 3}, (2, 3)),
    ],
)
def test_layers_of_stages(num_layers: int, layout: dict[str, int], expected: tuple[int, ...]) -> None:
    assert ParallelConfig(**layout).stage_layers(num_layers) == expected


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            Qwen3MoeConfig(num_experts_per_tok=1, norm_topk_prob=True),
            "the only probability is always 1, so the router cannot learn",
        ),
        (
            Qwen3MoeConfig(num_hidden_layers=2, mlp_only_layers=[0, 1]),
            r"no layer has experts; for a dense model, set model_type to qwen3\.",
        ),
        (Qwen3NextConfig(num_hidden_layers=4, decoder_sparse_step=5), r"no layer has experts; copy the file again\."),
        (Qwen2MoeConfig(num_experts_per_tok=61), "num_experts_per_tok = 61 of num_experts = 60"),
        (Qwen2MoeConfig(qkv_bias=False), "qkv_bias = False .default True.: published models have a bias"),
    ],
)
def test_experts_that_are_not_implemented(config: PretrainedConfig, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        read_family(config)


def test_offloading_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    check_offload(OptimizerConfig(), "bf16", FAMILY)
    with pytest.raises(ConfigError, match=r"optimizer\.cpu_offload = 0\.5, but this machine has no GPU"):
        check_offload(OptimizerConfig(cpu_offload=0.5), "bf16", FAMILY)
    with pytest.raises(ConfigError, match=r"optimizer\.cpu_offload = 2\.0; it is a share"):
        OptimizerConfig(cpu_offload=2.0)


def test_offloading_without_transformer_engine_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        ConfigError,
        match=r"cpu_offload = 1\.0 needs the Adam .* but Transformer Engine is not installed",
    ):
        check_offload(OptimizerConfig(cpu_offload=1.0), "bf16", FAMILY)


def test_offloading_float32_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    monkeypatch.setattr(optimizer, "missing_for_transformer_engine", lambda: None)
    check_offload(OptimizerConfig(cpu_offload=1.0), "bf16", FAMILY)
    with pytest.raises(ConfigError, match=r"cpu_offload = 1\.0, model\.precision = fp32; Megatron offloads the states of bf16"):
        check_offload(OptimizerConfig(cpu_offload=1.0), "fp32", FAMILY)
    with pytest.raises(ConfigError, match=r"cpu_offload = 1\.0: .* linear_attention keep A_log and dt_bias in float32"):
        check_offload(OptimizerConfig(cpu_offload=1.0), "bf16", read_family(HYBRID))


def test_dense_and_sparse_models_are_supported() -> None:
    for config in (Qwen2Config(), Qwen3Config(), Qwen2MoeConfig(), Qwen3MoeConfig()):
        read_family(config)

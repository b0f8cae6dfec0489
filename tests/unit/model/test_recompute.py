"""Recomputed modules give the same gradients; modules that a model's layers cannot recompute are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig, Qwen2MoeConfig, Qwen3Config, Qwen3MoeConfig

from mpo_megatron.config import ConfigError, ModelConfig, ParallelConfig
from mpo_megatron.data.loader import RowShape, build_step
from mpo_megatron.families import read_family
from mpo_megatron.hf.recompute import validate_recompute
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.model.recompute import check_offload_kernel, offload_settings
from mpo_megatron.train.reference import select_all
from mpo_megatron.train.step import run_rows
from tests.tiny import random_groups

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 97}
DENSE = Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=8)
EXPERTS = Qwen2MoeConfig(
    **SIZES,
    num_key_value_heads=2,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    shared_expert_intermediate_size=32,
)
ALONE = Qwen3MoeConfig(
    **SIZES,
    num_key_value_heads=2,
    head_dim=8,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
)
GROUPS: Any = random_groups(6, seed=3, vocab_size=97)


def gradients(config: PretrainedConfig, ranks: Ranks, **options: Any) -> dict[str, torch.Tensor]:
    model = ModelConfig(checkpoint="", precision="fp32", **options)
    parts = build_policy(read_family(config), model, ParallelConfig(), ranks, 128)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for _, parameter in sorted(parts[0].named_parameters()):
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    shape = RowShape(row_tokens=128, layout="shared", multiple=16, num_replicas=1, replica=0, pair_weight=1e-3)
    batch = build_step(0, GROUPS, np.arange(len(GROUPS)), select_all, shape)
    run_rows(parts, batch.rows, ranks, lambda row, logps, kl: (logps * torch.linspace(-1, 1, len(logps))).sum())
    return {name: parameter.grad for name, parameter in parts[0].named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    ("config", "modules"),
    [
        (DENSE, ["mlp"]),
        (DENSE, ["core_attn", "mlp"]),
        (EXPERTS, ["moe"]),
        (EXPERTS, ["shared_experts"]),
    ],
    ids=lambda value: value.model_type if isinstance(value, PretrainedConfig) else "-".join(value),
)
def test_gradients_stay(config: PretrainedConfig, modules: list[str], ranks: Ranks) -> None:
    plain = gradients(config, ranks)
    again = gradients(config, ranks, recompute="selective", recompute_modules=modules)
    assert plain.keys() == again.keys()
    assert len(plain) > 10
    exact = modules != ["shared_experts"]  # the gradients of its two branches are then added in another order
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6, msg=name)


ENGINE_ONLY = "Megatron-Core recomputes it with Transformer Engine only"


@pytest.mark.parametrize(
    ("family", "modules", "from_engine", "message"),
    [
        (DENSE, ["layernorm"], True, "recompute_modules has layernorm, but Transformer Engine computes these norms within"),
        (DENSE, ["layernorm"], False, f"has layernorm, but {ENGINE_ONLY}"),
        (DENSE, ["core_attn", "moe_act"], True, "has moe_act, but the model has no experts; remove it"),
        (EXPERTS, ["mlp"], True, "has mlp, but all layers of the model have experts; use moe"),
        (EXPERTS, ["moe_act"], False, f"has moe_act, but {ENGINE_ONLY}"),
        (ALONE, ["shared_experts"], True, "has shared_experts, but the model has no shared expert"),
        (EXPERTS, ["layernorm", "moe_act", "shared_experts"], True, None),
        (DENSE, ["core_attn", "mlp"], False, None),
    ],
)
def test_what_layers_cannot_recompute_is_refused(
    family: PretrainedConfig, modules: list[Any], from_engine: bool, message: str | None
) -> None:
    def check(**options: Any) -> None:
        validate_recompute(ModelConfig(checkpoint="", **options), ParallelConfig(), read_family(family), from_engine=from_engine)

    check(recompute="full")
    if message is None:
        check(recompute="selective", recompute_modules=modules)
        return
    with pytest.raises(ConfigError, match=message):
        check(recompute="selective", recompute_modules=modules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"recompute": "selective", "recompute_modules": []}, "name at least one module, each only once"),
        ({"recompute": "selective", "recompute_modules": ["mlp", "mlp"]}, "each only once"),
        ({"recompute_modules": ["mlp"]}, "which ignores it; set model.recompute to selective"),
        ({"offload_layers": -1}, "must be 0 or more"),
        ({"offload_layers": 2, "recompute": "full"}, "Megatron supports only one of them"),
    ],
)
def test_options_that_do_not_go_together(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(checkpoint="", **options)


def test_activations_are_offloaded_where_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    model = ModelConfig(checkpoint="", offload_layers=3)
    assert offload_settings(model)["cpu_offloading_num_layers"] == 3
    assert offload_settings(ModelConfig(checkpoint="")) == {}
    family = read_family(Qwen3Config(**{**SIZES, "num_hidden_layers": 4}, num_key_value_heads=2, head_dim=8))
    validate_recompute(model, ParallelConfig(), family, from_engine=True)
    with pytest.raises(ConfigError, match=r"offload_layers = 3, but the model has 2 layers, .* set it to 1 or less"):
        validate_recompute(model, ParallelConfig(), read_family(DENSE), from_engine=True)
    with pytest.raises(ConfigError, match=r"offload_layers = 3 with parallel.pipeline = 2"):
        validate_recompute(model, ParallelConfig(pipeline=2), family, from_engine=True)
    monkeypatch.setattr("mpo_megatron.model.recompute.missing_for_transformer_engine", lambda: "this machine has no GPU")
    with pytest.raises(ConfigError, match="offload_layers = 3, but this machine has no GPU"):
        check_offload_kernel(model)
    check_offload_kernel(ModelConfig(checkpoint=""))


@pytest.mark.parametrize(
    ("vocabulary", "gib", "chunk"),
    [(151_936, None, 1024), (151_936, 24, 1024), (151_936, 79.2, 2048), (151_936, 139.8, 4096), (18_992, 79.2, 8192)],
)
def test_chunks_of_log_probs_follow_the_gpus_memory(vocabulary: int, gib: float | None, chunk: int) -> None:
    memory = None if gib is None else round(gib * 2**30)
    assert ModelConfig(checkpoint="").chunk(vocabulary, memory) == chunk
    assert ModelConfig(checkpoint="", logprob_chunk=7).chunk(vocabulary, memory) == 7


def test_another_recompute_drops_its_options() -> None:
    model = ModelConfig(checkpoint="", recompute="selective", recompute_modules=["mlp"])
    assert model.with_recompute("selective") is model
    assert model.with_recompute("full").recompute_modules == ["core_attn"]
    assert ModelConfig(checkpoint="", offload_layers=2).with_recompute("full").offload_layers == 0

"""Settings enabled for speed where a machine supports them: fused kernels, overlapped exchange, visible warnings."""

from __future__ import annotations

import importlib.util
import logging
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core.extensions import transformer_engine
from megatron.core.models.common.embeddings import rope_utils
from megatron.core.tensor_parallel import layers
from transformers import Qwen2Config, Qwen3Config, Qwen3MoeConfig

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, OptimizerConfig, ParallelConfig
from mpo_megatron.families import read_family
from mpo_megatron.mcore import preparation
from mpo_megatron.model import architecture
from mpo_megatron.model.architecture import build_transformer_config
from mpo_megatron.model.experts import PERMUTE_KERNELS, expert_settings
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.policy import build_policy
from mpo_megatron.train.checkpoints.checkpoint import load_weights
from mpo_megatron.train.optimizer import build_optimizer, choose_overlap, update, wrap_data_parallel
from tests.unit.model.adapted import build_adapted, save_base

SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8}
DENSE = Qwen3Config(**SIZES, num_key_value_heads=2, vocab_size=50, tie_word_embeddings=False)
FAMILY = read_family(DENSE)
EXPERTS = Qwen3MoeConfig(
    **SIZES,
    num_key_value_heads=2,
    vocab_size=50,
    num_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=16,
    norm_topk_prob=True,
)


@pytest.mark.parametrize("engine", [False, True])
def test_weight_gradients_are_fused_in_transformer_engines_layers(engine: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(architecture, "use_transformer_engine", lambda model: engine)
    monkeypatch.setattr(rope_utils, "fused_apply_rotary_pos_emb", print)  # Transformer Engine's
    config = build_transformer_config(FAMILY, ModelConfig(checkpoint=""), ParallelConfig())
    assert config.gradient_accumulation_fusion == engine


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_cpu_gradients_are_added_in_the_gemm_and_weights_updated_in_one_pass(dtype: torch.dtype, ranks: Ranks) -> None:
    precision: Any = "bf16" if dtype is torch.bfloat16 else "fp32"
    parts = build_policy(FAMILY, ModelConfig(checkpoint="", precision=precision), ParallelConfig(), ranks, 64)
    linear: Any = dict(parts[0].named_modules())[("module." * (dtype is torch.bfloat16)) + "decoder.layers.0.mlp.linear_fc2"]
    model = wrap_data_parallel(parts, OptimizerConfig(), ranks)
    (single,) = build_optimizer(OptimizerConfig(), model, ranks).chained_optimizers
    assert all(group["fused"] for group in single.optimizer.param_groups)
    linear.weight.main_grad.fill_(1)
    x = torch.randn(5, 1, linear.weight.shape[1]).to(dtype)
    output = linear(x)[0]
    output.sum().backward()
    assert linear.weight.grad is None
    expected = torch.ones_like(output).flatten(0, 1).T @ x.flatten(0, 1)
    torch.testing.assert_close(linear.weight.main_grad, 1 + expected.float())


def test_a_cpu_rank_alone_copies_no_weights_or_gradients_to_exchange_them(ranks: Ranks) -> None:
    model = wrap_data_parallel(
        build_policy(FAMILY, ModelConfig(checkpoint=""), ParallelConfig(), ranks, 64), OptimizerConfig(), ranks
    )
    adam = build_optimizer(OptimizerConfig(), model, ranks)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model[0].finish_grad_sync()
        update(model, adam)
    names = {event.name for event in profiler.events()}
    assert "aten::_fused_adamw_" in names
    assert not [name for name in names if "gather" in name or "scatter" in name]


def test_the_output_layer_needs_no_fused_kernel(ranks: Ranks, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core's own layer raises if it should fuse without NVIDIA's apex; its GEMM is never run."""
    fused = build_transformer_config(FAMILY, ModelConfig(checkpoint=""), ParallelConfig())
    fused.gradient_accumulation_fusion = True
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    monkeypatch.setattr("mpo_megatron.model.policy.build_transformer_config", lambda *_: fused)
    with pytest.raises(RuntimeError, match="install APEX"):  # local layers
        build_policy(FAMILY, ModelConfig(checkpoint=""), ParallelConfig(), ranks, 64)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    (part,) = build_policy(FAMILY, ModelConfig(checkpoint=""), ParallelConfig(), ranks, 64)
    found = {name: getattr(module, "gradient_accumulation_fusion", None) for name, module in part.named_modules()}
    assert found.pop("module.output_layer") is False
    assert {value for value in found.values() if value is not None} == {True}


def test_nothing_deprecated_is_built(ranks: Ranks, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        build_policy(FAMILY, ModelConfig(checkpoint=""), ParallelConfig(), ranks, 64)
    messages = [*(record.getMessage() for record in caplog.records), *(str(warning.message) for warning in caught)]
    assert not [message for message in messages if "deprecated" in message.lower() and "GPTModel" in message]


@pytest.mark.parametrize("missing", [None, PERMUTE_KERNELS[-1], "fused_topk_with_score_function"])
def test_experts_kernels_are_fused_where_they_are(missing: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*PERMUTE_KERNELS, "fused_topk_with_score_function"):
        monkeypatch.setattr(transformer_engine, name, None if name == missing else print, raising=False)
    found = expert_settings(read_family(EXPERTS), ModelConfig(checkpoint=""), ParallelConfig(), from_engine=True)
    assert found["moe_permute_fusion"] == (missing not in PERMUTE_KERNELS)
    assert found["moe_router_fusion"] == (missing != "fused_topk_with_score_function")
    local = expert_settings(read_family(EXPERTS), ModelConfig(checkpoint=""), ParallelConfig(), from_engine=False)
    assert not local.get("moe_permute_fusion")
    assert not local.get("moe_router_fusion")


@pytest.mark.parametrize(
    ("overlap", "gpu", "replicas", "expected"),
    [
        ("auto", True, 2, "all"),
        ("auto", True, 1, "none"),
        ("auto", False, 2, "none"),
        ("gradients", True, 2, "gradients"),
        ("none", True, 2, "none"),
        ("all", False, 1, "all"),
    ],
)
def test_gpus_exchange_while_they_compute(
    overlap: Any, gpu: bool, replicas: int, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: gpu)
    assert choose_overlap(OptimizerConfig(overlap=overlap), replicas) == expected


LOST_SPEED = "When using sequence parallelism it is recommended to set the environment variable CUDA_DEVICE_MAX_CONNECTIONS to 1"


@pytest.mark.parametrize(("gpu", "rank", "shown"), [(True, "0", True), (True, "1", False), (False, "0", False)])
def test_a_warning_that_names_lost_speed_is_shown(gpu: bool, rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: gpu)
    monkeypatch.setenv("RANK", rank)
    with warnings.catch_warnings(record=True) as caught:
        warnings.resetwarnings()
        preparation.quiet_megatron()
        for message in (LOST_SPEED, *preparation.MEANINGLESS):
            warnings.warn_explicit(message, UserWarning, "layers.py", 1, module="megatron.core.tensor_parallel.layers")
    assert [str(warning.message) for warning in caught] == ([LOST_SPEED] if shown else [])


@pytest.mark.parametrize(("name", "start"), preparation.DEPRECATIONS.items())
def test_deprecations_that_only_megatrons_callers_can_heed_are_hidden(
    name: str, start: str, caplog: pytest.LogCaptureFixture
) -> None:
    """And each is still Megatron-Core's message."""
    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert start in Path(str(spec.origin)).read_text()
    preparation.quiet_megatron()
    logging.getLogger(name).warning("%s, and so on", start)
    logging.getLogger(name).warning("something else")
    assert caplog.messages == ["something else"]


def test_rotary_frequencies_are_transformers(ranks: Ranks) -> None:
    config = Qwen2Config(
        **{name: size for name, size in SIZES.items() if name != "head_dim"}, num_key_value_heads=2, vocab_size=50
    )
    (part,) = build_policy(read_family(config), ModelConfig(checkpoint=""), ParallelConfig(), ranks, 64)
    from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding

    (found,) = part.module.inverse_frequencies  # type: ignore[union-attr]
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, Qwen2RotaryEmbedding(config).inv_freq)


def test_a_load_of_a_checkpoint_warns_of_nothing_that_a_user_could_change(ranks: Ranks, tmp_path: Path) -> None:
    """And torch still gives each warning that is hidden; any other one is shown."""
    base = save_base(tmp_path, num_hidden_layers=1, hidden_size=32)
    _, parts = build_adapted(base, None, ranks)

    def load(*, quiet: bool) -> list[str]:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if quiet:
                preparation.quiet_megatron()
            load_weights(parts, base / "megatron", ranks)
            warnings.warn_explicit("other", FutureWarning, "utils.py", 1, module="torch.distributed.checkpoint.utils")
        return [str(warning.message) for warning in caught]

    shown = load(quiet=False)
    for _, message, module in preparation.TORCH:
        assert "checkpoint" not in module or any(text.startswith(message) for text in shown)
    assert load(quiet=True) == ["other"]

"""FP8 is refused, with the reason, where it cannot work; otherwise Megatron receives the recipe."""

from __future__ import annotations

import sys
import types
from typing import Any, cast, get_args, get_type_hints

import pytest
import torch
from transformers import Qwen2Config

from mpo_megatron.config import ConfigError, ModelConfig, ParallelConfig, TrainConfig, parse
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.families import read_family
from mpo_megatron.hf.fp8 import RECIPES, TOKEN_MULTIPLE, token_multiple
from mpo_megatron.mcore import weights
from mpo_megatron.model import precision
from mpo_megatron.model.architecture import build_transformer_config
from mpo_megatron.model.precision import numerics, validate_fp8
from mpo_megatron.train import optimizer
from mpo_megatron.train.reference_cache import cache_key

FP8 = sorted(RECIPES)
SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
HF = read_family(Qwen2Config(**SIZES, num_key_value_heads=4))


def engine(monkeypatch: pytest.MonkeyPatch, *, power_of_two: bool = True, **available: bool) -> None:
    """Replaces an installed Transformer Engine whose GPU has these recipes."""
    module = types.ModuleType("transformer_engine.pytorch")
    for recipe in RECIPES.values():
        answer = available.get(recipe.availability, True)
        reason = "" if answer else "Device compute capability 10.0 or higher required."
        setattr(module, recipe.availability, lambda return_reason, answer=answer, reason=reason: (answer, reason))
    recipes = types.ModuleType("transformer_engine.common.recipe")
    recipes.Float8CurrentScaling = lambda: types.SimpleNamespace(use_power_2_scales=power_of_two)
    for name, each in {"": types.ModuleType("transformer_engine"), ".pytorch": module, ".common.recipe": recipes}.items():
        monkeypatch.setitem(sys.modules, f"transformer_engine{name}", each)
    monkeypatch.setitem(sys.modules, "transformer_engine.common", types.ModuleType("transformer_engine.common"))
    monkeypatch.setenv(precision.POWER_OF_TWO_SCALES, "1")
    monkeypatch.setattr(sys.modules["transformer_engine"], "pytorch", module, raising=False)
    monkeypatch.setattr(precision.device, "has_gpu", lambda: True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8": "current", "precision": "fp32"}, "set precision to bf16"),
        ({"fp8": "current", "backend": "local"}, "FP8 needs Transformer Engine"),
        ({"fp8": "mxfp8", "fp8_params": True}, "set model.fp8 to current or blockwise"),
        ({"fp8_params": True}, "without FP8"),
        ({"fp8_bf16_layers": 2}, "without FP8"),
        ({"fp8_bf16_layers": -1}, "must be 0 or more"),
        ({"fp8": "current", "fp8_params": True, "resident_offload": True}, "set one to false"),
    ],
)
def test_refused_by_the_configuration(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ModelConfig(checkpoint="", **options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
@pytest.mark.parametrize("name", FP8)
def test_refused_without_a_gpu(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"model.fp8 = {name}, but this machine has no GPU"):
        validate_fp8(ModelConfig(checkpoint="", fp8=name), ParallelConfig(), HF)


def test_refused_without_transformer_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision.device, "has_gpu", lambda: True)
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    with pytest.raises(
        ConfigError, match=r"model.fp8 = current, but Transformer Engine is not installed; .*pip install .* Or set"
    ):
        validate_fp8(ModelConfig(checkpoint="", fp8="current"), ParallelConfig(), HF)


def test_refused_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, is_mxfp8_available=False)
    validate_fp8(ModelConfig(checkpoint="", fp8="current"), ParallelConfig(), HF)
    with pytest.raises(ConfigError, match=r"model.fp8 = mxfp8, but Device compute capability 10.0 or higher required; set"):
        validate_fp8(ModelConfig(checkpoint="", fp8="mxfp8"), ParallelConfig(), HF)


def test_scales_that_are_no_powers_of_two_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, power_of_two=False)
    validate_fp8(ModelConfig(checkpoint="", fp8="blockwise"), ParallelConfig(), HF)
    with pytest.raises(ConfigError, match="ignores NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES=1"):
        validate_fp8(ModelConfig(checkpoint="", fp8="current"), ParallelConfig(), HF)
    monkeypatch.setenv(precision.POWER_OF_TWO_SCALES, "0")  # a user's choice of scales is kept
    validate_fp8(ModelConfig(checkpoint="", fp8="current"), ParallelConfig(), HF)


def test_a_recipe_that_transformer_engine_does_not_know_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch)
    del sys.modules["transformer_engine.pytorch"].is_mxfp8_available
    with pytest.raises(ConfigError, match=r"has no is_mxfp8_available; set model.fp8 to another"):
        validate_fp8(ModelConfig(checkpoint="", fp8="mxfp8"), ParallelConfig(), HF)


def test_the_optimizer_starts_from_unrounded_weights() -> None:
    part = torch.nn.Linear(2, 2, bias=False)
    part.weight.get_high_precision_init_val = lambda: getattr(part.weight, precision.UNROUNDED)
    with pytest.raises(AttributeError, match=precision.UNROUNDED):
        precision.keep_exact_weights(part, {"weight": torch.ones(2, 2)})
    setattr(part.weight, precision.UNROUNDED, torch.zeros(2, 2))
    precision.keep_exact_weights(part, {"weight": torch.ones(2, 2)})
    assert torch.equal(part.weight.get_high_precision_init_val(), torch.ones(2, 2))


@pytest.mark.parametrize(
    ("name", "changes", "parallel", "message"),
    [
        ("current", {"intermediate_size": 18952}, {}, "intermediate_size is 18952 on each of 1"),
        ("mxfp8", {"intermediate_size": 18944 + 16}, {}, "multiples of 32, but the model's intermediate_size"),
        ("blockwise", {"hidden_size": 64 * 28, "head_dim": 128}, {"tensor": 2, "sequence": False}, None),
        ("blockwise", {"hidden_size": 65 * 64, "head_dim": 128}, {"tensor": 2}, "blocks of 128 channels"),
        ("current", {"num_hidden_layers": 4}, {"pipeline": 4}, "more than the 1 layers of a pipeline stage"),
        ("current", {}, {"tensor": 4}, None),
    ],
)
def test_sizes(
    monkeypatch: pytest.MonkeyPatch, name: str, changes: dict[str, int], parallel: dict[str, int], message: str | None
) -> None:
    engine(monkeypatch)
    config = read_family(Qwen2Config(**{**SIZES, **changes}, num_key_value_heads=4))
    model = ModelConfig(checkpoint="", fp8=name, fp8_bf16_layers=2)
    if message is None:
        validate_fp8(model, ParallelConfig(**parallel), config)
        return
    with pytest.raises(ConfigError, match=message):
        validate_fp8(model, ParallelConfig(**parallel), config)


@pytest.mark.parametrize("name", FP8)
def test_megatron_is_told_the_recipe(name: str) -> None:
    model = ModelConfig(checkpoint="", fp8=name, fp8_bf16_layers=2)
    config = build_transformer_config(HF, model, ParallelConfig())
    assert config.fp8 == ("hybrid" if name == "current" else "e4m3")
    assert config.fp8_recipe == {"current": "tensorwise"}.get(name, name)
    assert config.first_last_layers_bf16
    assert config.num_layers_at_end_in_bf16 == 2
    assert not config.fp8_dot_product_attention


def test_without_fp8_nothing_changes() -> None:
    model = ModelConfig(checkpoint="")
    validate_fp8(model, ParallelConfig(), HF)
    assert build_transformer_config(HF, model, ParallelConfig()).fp8 is None
    assert numerics(model) is None
    assert token_multiple(model) == TOKEN_MULTIPLE


@pytest.mark.parametrize("name", FP8)
def test_rows_are_whole_blocks(name: str) -> None:
    multiple = token_multiple(ModelConfig(checkpoint="", fp8=name))
    assert multiple % {"blockwise": 128, "mxfp8": 32}.get(name, 16) == 0


def test_delayed_scaling_is_not_offered() -> None:
    assert not any(recipe.megatron == "delayed" for recipe in RECIPES.values())
    assert get_args(get_type_hints(ModelConfig)["fp8"]) == ("none", *RECIPES)
    with pytest.raises(ConfigError, match=r"model.fp8 = delayed; it must be one of none, current, blockwise, mxfp8"):
        parse(TrainConfig, ["--model.fp8", "delayed", *("--model.checkpoint", "m", "--data.train", "d", "--output", "o")])


def test_weights_that_are_gathered_early_are_transposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core omits it where a gather overlaps with the forward pass, and was forced before it."""
    events: list[object] = []
    in_8_bits, other = torch.nn.Parameter(torch.zeros(1)), torch.nn.Parameter(torch.zeros(1))
    monkeypatch.setattr(weights, "is_float8tensor", lambda tensor: tensor is in_8_bits)
    monkeypatch.setattr(weights, "post_all_gather_processing", lambda tensors: events.append([id(each) for each in tensors]))

    class Wrapped(torch.nn.Module):
        ddp_config = types.SimpleNamespace(overlap_param_gather=True)

        def start_param_sync(self, *, force_sync: bool) -> None:
            events.append(force_sync)

    part = Wrapped()
    part.in_8_bits, part.other = in_8_bits, other
    optimizer.gather_weights([part])
    assert events == [True, [id(in_8_bits)]]


def test_the_cache_of_reference_log_probs_knows_recipe_and_kernels() -> None:
    info = types.SimpleNamespace(data_digest="data", tokenizer_digest="tokenizer")
    data = cast(PreparedGroups, types.SimpleNamespace(info=info))
    options: list[dict[str, Any]] = [
        {},
        {"backend": "local"},
        {"attention": "varlen"},
        {"delta_rule": "torch"},
        {"delta_rule": "fla"},
        {"precision": "fp32"},
        {"fp8": "current"},
        {"fp8": "current", "fp8_bf16_layers": 1},
        {"fp8": "current", "fp8_params": True},
        {"fp8": "blockwise"},
    ]
    decided = {"checkpoint": "", "backend": "transformer_engine", "attention": "flex"}
    keys = [cache_key("digest", data, ModelConfig(**{**decided, **each})) for each in options]
    assert len(set(keys)) == len(options)

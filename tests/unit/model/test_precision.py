"""FP8 is refused, with the reason, where it cannot work; where it can, Megatron is told the recipe."""

from __future__ import annotations

import sys
import types

import pytest
import torch
from transformers import Qwen2Config

from mpo_megatron.config import ConfigError, ModelConfig, ParallelConfig
from mpo_megatron.hf.fp8 import RECIPES, TOKEN_MULTIPLE, token_multiple
from mpo_megatron.model import precision
from mpo_megatron.model.architecture import build_transformer_config
from mpo_megatron.model.precision import numerics, validate_fp8

FP8 = sorted(RECIPES)
SIZES = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
HF = Qwen2Config(**SIZES, num_key_value_heads=4)


def engine(monkeypatch: pytest.MonkeyPatch, **available: bool) -> None:
    """Stands for an installed Transformer Engine whose GPU has these recipes."""
    module = types.ModuleType("transformer_engine.pytorch")
    for recipe in RECIPES.values():
        answer = available.get(recipe.availability, True)
        reason = "" if answer else "Device compute capability 10.0 or higher required."
        setattr(module, recipe.availability, lambda return_reason, answer=answer, reason=reason: (answer, reason))
    monkeypatch.setitem(sys.modules, "transformer_engine", types.ModuleType("transformer_engine"))
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", module)
    monkeypatch.setattr(sys.modules["transformer_engine"], "pytorch", module, raising=False)
    monkeypatch.setattr(precision.device, "has_gpu", lambda: True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fp8": "current", "precision": "fp32"}, "set precision to bf16"),
        ({"fp8": "current", "backend": "local"}, "FP8 is Transformer Engine's"),
        ({"fp8": "delayed", "fp8_bf16_layers": 1}, "set it to 0, or model.fp8 to current"),
        ({"fp8": "delayed", "fp8_params": True}, "not known yet when weights are loaded"),
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
    with pytest.raises(ConfigError, match=r"model.fp8 = current, but transformer_engine does not import .*pip install"):
        validate_fp8(ModelConfig(checkpoint="", fp8="current"), ParallelConfig(), HF)


def test_refused_on_an_older_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    engine(monkeypatch, is_mxfp8_available=False)
    validate_fp8(ModelConfig(checkpoint="", fp8="current"), ParallelConfig(), HF)
    with pytest.raises(ConfigError, match=r"model.fp8 = mxfp8, but Device compute capability 10.0 or higher required; set"):
        validate_fp8(ModelConfig(checkpoint="", fp8="mxfp8"), ParallelConfig(), HF)


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
    config = Qwen2Config(**{**SIZES, **changes}, num_key_value_heads=4)
    model = ModelConfig(checkpoint="", fp8=name, fp8_bf16_layers=2)
    if message is None:
        validate_fp8(model, ParallelConfig(**parallel), config)
        return
    with pytest.raises(ConfigError, match=message):
        validate_fp8(model, ParallelConfig(**parallel), config)


@pytest.mark.parametrize("name", FP8)
def test_megatron_is_told_the_recipe(name: str) -> None:
    edges = 0 if name == "delayed" else 2
    model = ModelConfig(checkpoint="", fp8=name, fp8_bf16_layers=edges)
    config = build_transformer_config(HF, model, ParallelConfig())
    assert config.fp8 == ("hybrid" if name in ("delayed", "current") else "e4m3")
    assert config.fp8_recipe == {"current": "tensorwise"}.get(name, name)
    assert config.first_last_layers_bf16 == (edges > 0)
    assert config.num_layers_at_end_in_bf16 == edges
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


class _Part(torch.nn.Module):
    def __init__(self, recipe: str | None) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(fp8=None if recipe is None else "hybrid", fp8_recipe=recipe or "delayed")


@pytest.mark.parametrize(("recipe", "delayed"), [(None, False), ("delayed", True), ("tensorwise", False), ("blockwise", False)])
def test_only_delayed_has_a_state(recipe: str | None, delayed: bool) -> None:
    assert precision.has_delayed_scales(_Part(recipe)) == delayed

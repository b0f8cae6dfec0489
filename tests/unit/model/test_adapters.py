"""A model with adapters: which layers have one, what it computes beside PEFT, its start, its norm and its size."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from mpo_megatron.config import (
    ConfigError,
    ConvertConfig,
    DataConfig,
    LoraConfig,
    ModelConfig,
    OnlineConfig,
    OptimizerConfig,
    ParallelConfig,
    TrainConfig,
)
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import Adapter, choose_adapter
from mpo_megatron.hf.adapter import read_adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model.adapter_weights import adapter_norm, fill_adapters, initial_matrix, initialize_adapters
from mpo_megatron.model.adapters import adapters_off, clear_adapters, linear_adapters_of
from mpo_megatron.model.convert import convert
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.plan.parameters import Part, adapter_weights, buffer_size, part_weights
from mpo_megatron.rollout.engines.embedded import load_merged
from mpo_megatron.train.adapting import check_output_layer
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.optimizer import wrap_data_parallel
from tests.distributed.adapters import start_matrix
from tests.unit.model.adapted import build_adapted, save_base, save_peft, token_logps, token_row

FUSED: dict[str, tuple[dict[str, Any], list[str]]] = {
    "qwen3_next": ({"use_rslora": True, "lora_alpha": 7}, ["in_proj_qkvz", "in_proj_ba", "out_proj", "q_proj", "v_proj"]),
    "qwen3_5_text": ({}, ["in_proj_qkv", "in_proj_z", "out_proj", "q_proj", "down_proj"]),
    "qwen3_5_moe_text": ({"use_rslora": True}, ["in_proj_z", "in_proj_b", "in_proj_a", "k_proj", "o_proj"]),
}
"""Model types with Gated DeltaNets, PEFT's options and target modules."""


@pytest.mark.parametrize("model_type", FUSED)
def test_rows_of_fused_layers_find_their_places(
    model_type: str, tmp_path: Path, ranks: Ranks, capsys: pytest.CaptureFixture[str]
) -> None:
    """In hybrid models Megatron orders some rows differently (queries and their gates): the model matches PEFT's folder and
    log-probs, and so does a merge."""
    options, targets = FUSED[model_type]
    save_base(tmp_path, model_type=model_type, num_hidden_layers=2, layer_types=["linear_attention", "full_attention"])
    peft = save_peft(tmp_path, tmp_path / "peft", target_modules=targets, **options)
    convert(ConvertConfig(input=str(tmp_path / "peft"), output=str(tmp_path / "adapter"), base=str(tmp_path / "megatron")))
    adapter = read_adapter(tmp_path / "adapter").adapter
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    family, parts = build_adapted(tmp_path, adapter, ranks)

    def check() -> None:
        held = dict(LiveWeights.of_adapter(parts, family, adapter, ranks).stream())
        assert held.keys() == stored.keys()
        for name, matrix in stored.items():
            assert torch.equal(held[name], matrix), name

    fill_adapters(parts, family, adapter, ranks, lambda name, shape: stored[name])
    check()
    clear_adapters(parts)
    checkpoint.load_adapter(parts, tmp_path / "adapter", ranks)
    check()
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    warned = "an adapter of in_proj_z without one of in_proj_qkv: vLLM cannot load it" in capsys.readouterr().err
    assert warned == (model_type == "qwen3_5_moe_text")
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(torch.equal(exported[name], matrix) for name, matrix in stored.items())
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "merged"), merge=True))
    checkpoint.load_weights(parts, tmp_path / "megatron", ranks)
    merged, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("merged", "hf"))
    with torch.no_grad():
        ours = parts[0](*token_row())
        expected, also, without = (token_logps(model) for model in (peft, merged, plain))
    assert (expected - without).abs().max() > 0.05
    # 2⁻²⁴ of the largest values, through 2 layers of sums of about 100 products
    assert max((found - expected).abs().max() for found in (ours, also)) <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("tied", [True, False])
def test_the_output_layer_has_an_adapter_of_its_own(tied: bool, tmp_path: Path, ranks: Ranks) -> None:
    """From PEFT and back, merged, and generating: if it is tied to the embedding, that keeps its weights, as in PEFT."""
    base = save_base(tmp_path, model_type="qwen3", tied=tied, num_hidden_layers=1)
    peft = save_peft(base, tmp_path / "peft", target_modules=["q_proj", "lm_head"])
    copy = "base_model.model.lm_head.base_layer.weight"
    stored = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    assert copy in stored  # PEFT's own decision
    megatron, merged = tmp_path / "megatron", tmp_path / "merged"
    convert(ConvertConfig(input=str(tmp_path / "peft"), output=str(tmp_path / "adapter"), base=str(megatron)))
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    exported = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert exported.keys() == stored.keys() - {copy}
    assert all(torch.equal(stored[name], matrix) for name, matrix in exported.items())
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "hf"), tmp_path / "out")
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(merged), merge=True))
    assert json.loads((merged / "config.json").read_text())["tie_word_embeddings"] is False
    embeddings = [load_file(folder / "model.safetensors")["model.embed_tokens.weight"] for folder in (base / "hf", merged)]
    assert torch.equal(*embeddings)
    adapter = read_adapter(tmp_path / "adapter").adapter
    family, parts = build_adapted(base, adapter, ranks)
    checkpoint.load_weights(parts, megatron, ranks)
    checkpoint.load_adapter(parts, tmp_path / "adapter", ranks)
    held = dict(LiveWeights.of_adapter(parts, family, adapter, ranks).stream())
    assert held.keys() == exported.keys()
    assert all(torch.equal(held[name], matrix) for name, matrix in exported.items())
    models = [peft, again, AutoModelForCausalLM.from_pretrained(merged), load_merged(base / "hf", tmp_path / "peft", "auto")]
    with torch.no_grad():
        ours = parts[0](*token_row())
        expected, reloaded, *others = (token_logps(model) for model in models)
        with adapters_off(parts):
            without = parts[0](*token_row())
    assert torch.equal(expected, reloaded)
    assert (expected - without).abs().max() > 0.05
    # 2⁻²⁴ of the largest values, through sums of about 100 products
    assert max((found - expected).abs().max() for found in (ours, *others)) <= 1e-5 * expected.abs().max()
    part = Part(layers=range(1), first=True, last=True)
    padded = load_conversion(megatron).padded_vocab_size
    (wrapped,) = wrap_data_parallel(parts, OptimizerConfig(), ranks)
    planned = buffer_size(adapter_weights(family, adapter, ParallelConfig(), part, padded), 1)
    assert sum(buffer.grad_data.numel() for buffer in wrapped.buffers) == planned  # type: ignore[union-attr, operator]
    squares = [
        (adapter.scale * held[name.replace("lora_A", "lora_B")].double() @ down.double()).square().sum()
        for name, down in held.items()
        if "lora_A" in name
    ]
    assert adapter_norm(parts, ranks) == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-10)
    stored[copy][3, 5] += 1
    save_file(stored, tmp_path / "peft" / "adapter_model.safetensors")
    for use in (
        lambda: convert(ConvertConfig(input=str(tmp_path / "peft"), output=str(tmp_path / "other"), base=str(megatron))),
        lambda: load_merged(base / "hf", tmp_path / "peft", "auto"),
    ):
        with pytest.raises(ConfigError, match=r"lm_head.base_layer.weight is .*and not the output layer's weight in"):
            use()


def test_targets_by_name_and_by_group(base: Path) -> None:
    family = load_family(base / "megatron" / "hf")
    attention, mlp = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj", "down_proj")

    def targets(*names: str) -> tuple[str, ...]:
        adapter = choose_adapter(family, LoraConfig(rank=2, target_modules=list(names)))
        assert adapter is not None
        return adapter.target_modules

    assert targets("all-linear") == attention + mlp
    assert targets("attention") == attention
    assert targets("mlp") == mlp
    assert choose_adapter(family, LoraConfig(rank=2, target_modules="mlp")) == choose_adapter(
        family, LoraConfig(rank=2, target_modules=["mlp"])
    )
    assert targets("v_proj", "q_proj") == ("q_proj", "v_proj")
    assert targets("lm_head", "all-linear") == (*attention, *mlp, "lm_head")  # by choice: no group has it
    for name in ("embed_tokens", "qkv_proj"):
        with pytest.raises(ConfigError, match=rf"names {name}, .*choose from q_proj, k_proj, .*down_proj, lm_head, or attention"):
            targets("q_proj", name)
    assert choose_adapter(family, LoraConfig()) is None


def test_what_an_adapter_of_the_output_layer_excludes(base: Path) -> None:
    family = load_family(base / "megatron" / "hf")
    alone = Adapter(rank=2, alpha=4.0, rslora=False, target_modules=("lm_head",))
    model, data = ModelConfig(checkpoint="model"), DataConfig(train="groups")

    def check(adapter: Adapter = alone, **options: Any) -> None:
        check_output_layer(TrainConfig(output="run", model=model, data=data, **options), family, adapter)

    check()
    check(replace(alone, target_modules=("q_proj", "lm_head")), parallel=ParallelConfig(pipeline=2))
    with pytest.raises(ConfigError, match=r"lm_head with parallel.pipeline = 2: only the last stage would train; add other"):
        check(parallel=ParallelConfig(pipeline=2))
    with pytest.raises(ConfigError, match=r"lm_head, which is tied to the embedding, with online.kl_weight"):
        check(online=OnlineConfig(kl_weight=0.1))


def test_scales() -> None:
    adapter = Adapter(rank=16, alpha=8.0, rslora=False, target_modules=("q_proj",))
    assert adapter.scale == 0.5
    assert Adapter(rank=16, alpha=8.0, rslora=True, target_modules=("q_proj",)).scale == 2.0


def test_a_new_adapter_changes_nothing_and_has_peft_s_distribution(base: Path, ranks: Ranks) -> None:
    """Log-probs with B = 0 equal the base model's bitwise; A is uniform with PEFT's bound, and differs between layers."""
    adapter = Adapter(rank=8, alpha=16.0, rslora=False, target_modules=("q_proj", "k_proj", "o_proj", "up_proj", "down_proj"))
    family, parts = build_adapted(base, adapter, ranks)
    checkpoint.load_weights(parts, base / "megatron", ranks)
    initialize_adapters(parts, family, adapter, ranks, seed=5)
    assert adapter_norm(parts, ranks) == 0
    found: dict[str, Tensor] = {}
    found.update(LiveWeights.of_adapter(parts, family, adapter, ranks).stream())
    assert len(found) == 2 * 2 * 5
    for name, tensor in found.items():
        assert torch.equal(tensor, initial_matrix(name, tuple(tensor.shape), 5)), name
        bound = tensor.shape[1] ** -0.5
        assert not tensor.any() if ".lora_B." in name else 0.95 * bound < tensor.abs().max() <= bound
    first = [tensor for name, tensor in found.items() if "q_proj.lora_A" in name]
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(initial_matrix("x.lora_A.weight", (8, 64), 5), initial_matrix("x.lora_A.weight", (8, 64), 6))
    layer = linear_adapters_of(parts[0])[0]
    x = torch.randn(7, 1, 64, generator=torch.Generator().manual_seed(1))
    module: Any = next(module for module in parts[0].modules() if getattr(module, "adapter", None) is layer)
    on, _ = module(x)
    with adapters_off(parts):
        off, _ = module(x)
    assert torch.equal(on, off)
    fill_adapters(parts, family, adapter, ranks, start_matrix)
    changed, _ = module(x)
    with adapters_off(parts):
        assert torch.equal(module(x)[0], off)
    assert (changed - off).abs().max() > 0.01
    trained = [name for name, parameter in parts[0].named_parameters() if parameter.requires_grad]
    assert len(trained) == 20
    assert all(".adapter." in name for name in trained)


def test_the_planner_counts_what_is_trained(base: Path, ranks: Ranks) -> None:
    """Elements of Megatron's gradient buffers, and of the weights without gradients."""
    family = load_family(base / "megatron" / "hf")
    adapter = choose_adapter(family, LoraConfig(rank=5))
    assert adapter is not None
    _, parts = build_adapted(base, adapter, ranks)
    part = Part(layers=range(2), first=True, last=True)
    padded = load_conversion(base / "megatron").padded_vocab_size
    frozen = sum(parameter.numel() for parameter in parts[0].parameters() if not parameter.requires_grad)
    assert sum(weight.total for weight in part_weights(family, ParallelConfig(), part, padded)) == frozen
    (wrapped,) = wrap_data_parallel(parts, OptimizerConfig(), ranks)
    planned = buffer_size(adapter_weights(family, adapter, ParallelConfig(), part, padded), 1)
    assert sum(buffer.grad_data.numel() for buffer in wrapped.buffers) == planned  # type: ignore[union-attr, operator]
    assert not wrapped.expert_parallel_buffers  # type: ignore[operator]


def test_the_norm_is_that_of_all_products(base: Path, ranks: Ranks) -> None:
    adapter = Adapter(rank=2, alpha=3.0, rslora=True, target_modules=("v_proj", "down_proj"))
    family, parts = build_adapted(base, adapter, ranks)
    fill_adapters(parts, family, adapter, ranks, start_matrix)
    found: dict[str, Tensor] = {}
    found.update({name: tensor.double() for name, tensor in LiveWeights.of_adapter(parts, family, adapter, ranks).stream()})
    squares = [
        (adapter.scale * found[name.replace("lora_A", "lora_B")] @ down).square().sum()
        for name, down in found.items()
        if "lora_A" in name
    ]
    assert adapter_norm(parts, ranks) == pytest.approx(float(torch.stack(squares).sum().sqrt()), rel=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": -1}, "lora.rank = -1; it must be 0"),
        ({"rank": 4, "alpha": 0.0}, "lora.alpha = 0.0; it must be positive"),
        ({"alpha": 8.0}, "lora.alpha = 8.0 without lora.rank"),
        ({"rslora": True}, "lora.rslora = True without lora.rank"),
        ({"rank": 4, "target_modules": []}, "name at least one layer"),
        ({"rank": 4, "target_modules": ["q_proj", "q_proj"]}, "each only once"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LoraConfig(**options)

"""Adapters: initialisation, import and export of PEFT's folders, merging, and refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
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
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import Adapter, choose_adapter
from mpo_megatron.files import digests
from mpo_megatron.hf.adapter import read_adapter
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.hf.identity import is_adapter_folder, weights_digest
from mpo_megatron.model.adapter_weights import adapter_norm, fill_adapters, initial_matrix, initialize_adapters
from mpo_megatron.model.adapters import adapters_off, clear_adapters, linear_adapters_of
from mpo_megatron.model.attention import row_layout
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_adapter import peft_settings
from mpo_megatron.model.live_weights import LiveWeights
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.weight_map import build_adapter_map
from mpo_megatron.plan.parameters import Part, adapter_weights, buffer_size, part_weights
from mpo_megatron.rollout.engines.embedded import load_merged
from mpo_megatron.train.adapting import check_output_layer
from mpo_megatron.train.checkpoints import checkpoint
from mpo_megatron.train.optimizer import wrap_data_parallel
from tests.distributed.adapters import start_matrix
from tests.tiny import save_model
from tests.unit.model.adapted import build_adapted, save_base

TOKENS = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 60]])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in both formats: hf and megatron."""
    return save_base(tmp_path_factory.mktemp("base"), model_type="qwen2", tied=True, num_hidden_layers=2)


def save_peft(base: Path, folder: Path, **options: Any) -> PeftModel:
    """A saved PEFT adapter with nonzero B, and its model."""
    model = AutoModelForCausalLM.from_pretrained(base / "hf", dtype=torch.float32)
    settings = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj", "o_proj", "gate_proj", "down_proj"]} | options
    adapted = get_peft_model(model, PeftConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(start_matrix(name, tuple(weight.shape)))
    adapted.save_pretrained(folder)
    return adapted.eval()


@pytest.fixture(scope="module")
def peft(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    """PEFT's folder of an adapter, and its logits of TOKENS."""
    folder = tmp_path_factory.mktemp("peft") / "adapter"
    model = save_peft(base, folder)
    with torch.no_grad():
        return folder, model(TOKENS).logits


def test_a_peft_adapter_goes_in_and_out_bit_for_bit(base: Path, peft: tuple[Path, Tensor], tmp_path: Path) -> None:
    megatron, out = tmp_path / "adapter", tmp_path / "out"
    convert(ConvertConfig(input=str(peft[0]), output=str(megatron), base=str(base / "megatron")))
    assert is_adapter_folder(megatron)
    record = read_adapter(megatron)
    assert record.base_digest == weights_digest(base / "megatron")
    assert record.adapter == Adapter(
        rank=3, alpha=5.0, rslora=False, target_modules=("q_proj", "v_proj", "o_proj", "gate_proj", "down_proj")
    )
    convert(ConvertConfig(input=str(megatron), output=str(out)))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (peft[0], out))
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert torch.equal(tensor.view(torch.uint8), after[name].view(torch.uint8)), name
    assert (out / "adapter_config.json").read_bytes() == (peft[0] / "adapter_config.json").read_bytes()
    assert not (out / "config.json").exists()


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
    length = TOKENS.shape[1]
    row: Any = (TOKENS, torch.arange(length)[None], row_layout([(0, length, 0, 0)]), np.arange(length - 1), TOKENS[0, 1:])
    merged, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32) for name in ("merged", "hf"))
    with torch.no_grad():
        ours = parts[0](*row)
        expected, also, without = (
            model(TOKENS).logits[0, :-1].log_softmax(-1).gather(1, TOKENS[0, 1:, None])[:, 0] for model in (peft, merged, plain)
        )
    assert (expected - without).abs().max() > 0.05
    # 2⁻²⁴ of the largest values, through 2 layers of sums of about 100 products
    assert max((found - expected).abs().max() for found in (ours, also)) <= 1e-5 * expected.abs().max()


def test_a_merged_model_answers_as_the_adapter_does(
    base: Path, peft: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also directly from PEFT's folder; float32 weights are summed in float64, so that only one rounding differs."""
    folder, logits = peft
    megatron = tmp_path / "adapter"
    convert(ConvertConfig(input=str(folder), output=str(megatron), base=str(base / "megatron")))
    convert(ConvertConfig(input=str(megatron), output=str(tmp_path / "merged"), merge=True))
    options = {"merge": True, "base": str(base / "megatron")}
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "straight"), **options))  # type: ignore[arg-type]
    assert "rounding changes 0.00% of it" in capsys.readouterr().err
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("merged", "straight")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        merged, plain = model(TOKENS).logits, AutoModelForCausalLM.from_pretrained(base / "hf")(TOKENS).logits
    assert (plain - logits).abs().max() > 0.05
    # 2⁻²⁴ of the largest values, through 2 layers of sums of about 100 products
    assert (merged - logits).abs().max() <= 1e-5 * logits.abs().max()


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
    length = TOKENS.shape[1]
    row: Any = (TOKENS, torch.arange(length)[None], row_layout([(0, length, 0, 0)]), np.arange(length - 1), TOKENS[0, 1:])
    models = [peft, again, AutoModelForCausalLM.from_pretrained(merged), load_merged(base / "hf", tmp_path / "peft", "auto")]
    with torch.no_grad():
        ours = parts[0](*row)
        expected, reloaded, *others = (
            model(TOKENS).logits[0, :-1].log_softmax(-1).gather(1, TOKENS[0, 1:, None])[:, 0] for model in models
        )
        with adapters_off(parts):
            without = parts[0](*row)
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


def test_odd_values_of_an_adapter_are_reported_at_every_conversion(
    base: Path, peft: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_config.json").write_bytes((peft[0] / "adapter_config.json").read_bytes())
    matrices = load_file(peft[0] / "adapter_model.safetensors")
    name = next(name for name in matrices if name.endswith("q_proj.lora_B.weight"))
    matrices[name][0, 0] = float("inf")
    save_file(matrices, folder / "adapter_model.safetensors")
    megatron = str(base / "megatron")
    for source, output, options in (
        (folder, tmp_path / "adapter", {"base": megatron}),
        (tmp_path / "adapter", tmp_path / "back", {}),
    ):
        capsys.readouterr()
        convert(ConvertConfig(input=str(source), output=str(output), **options))
        assert f"WARNING: {source}: 1 value is NaN or infinite, in {name};" in capsys.readouterr().err
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "merged"), merge=True))
    merged = name.removeprefix("base_model.model.").replace("lora_B.weight", "weight")
    assert f"NaN or infinite, in {merged};" in capsys.readouterr().err


def test_a_merge_reports_how_rounding_changes_log_probs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In bf16, against the same comparison made here with plain `transformers`."""
    save_model(tmp_path / "hf", model_type="qwen2", num_hidden_layers=2)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "hf")
    convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "megatron")))
    save_peft(tmp_path, tmp_path / "peft")
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog.")
    options: dict[str, Any] = {"merge": True, "base": str(tmp_path / "megatron"), "compare_text": str(tmp_path / "text.txt")}
    convert(ConvertConfig(input=str(tmp_path / "peft"), output=str(tmp_path / "merged"), **options))
    reported = next(line for line in capsys.readouterr().err.splitlines() if "log-probs of" in line)
    tokens = torch.tensor([list(load_tokenizer(tmp_path / "hf").encode("The quick brown fox jumps over the lazy dog."))])
    exact = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32), tmp_path / "peft"
    )
    rounded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    with torch.no_grad():
        ours, theirs = (model(tokens).logits[0, :-1].log_softmax(-1).gather(1, tokens[0, 1:, None]) for model in (rounded, exact))
    change = (ours - theirs).abs()
    found = [float(word) for word in reported.split() if "e-" in word and word[0].isdigit()]
    assert found == pytest.approx([float(change.mean()), float(change.max())], rel=0.02)
    assert found[1] > 1e-4
    with pytest.raises(ConfigError, match="without merge"):
        ConvertConfig(input="a", output="b", compare_text="c")


def test_our_export_loads_in_peft(base: Path, ranks: Ranks, tmp_path: Path) -> None:
    """Its configuration then: rsLoRA, and a fractional alpha."""
    model = save_peft(base, tmp_path / "peft", use_rslora=True, lora_alpha=7)
    convert(ConvertConfig(input=str(tmp_path / "peft"), output=str(tmp_path / "adapter"), base=str(base / "megatron")))
    (tmp_path / "adapter" / "peft" / "adapter_config.json").unlink()
    (tmp_path / "adapter" / "mpo_digests.json").unlink()
    digests.write_list(tmp_path / "adapter")
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "hf"), tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(again(TOKENS).logits, model(TOKENS).logits)


@pytest.mark.parametrize(("model_type", "loads"), [("qwen3_moe", True), ("mixtral", True), ("qwen2_moe", False)])
def test_adapters_of_experts_in_peft(model_type: str, loads: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """PEFT loads those of some model types as they were trained; for the others the export says to merge."""
    save_base(tmp_path, model_type=model_type, num_hidden_layers=1)
    family = load_family(tmp_path / "hf")
    adapter = choose_adapter(family, LoraConfig(rank=2, target_modules="mlp"))
    assert adapter is not None
    shapes = {part.name: part.shape for item in build_adapter_map(family, adapter, family.vocab_size) for part in item.placements}
    (tmp_path / "peft").mkdir()
    save_file({name: start_matrix(name, shape) for name, shape in shapes.items()}, tmp_path / "peft/adapter_model.safetensors")
    (tmp_path / "peft/adapter_config.json").write_text(json.dumps(peft_settings(adapter, "base")))
    convert(ConvertConfig(input=str(tmp_path / "peft"), output=str(tmp_path / "adapter"), base=str(tmp_path / "megatron")))
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "out")))
    assert ("merge the adapter" in capsys.readouterr().err) == (not loads)
    convert(ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "merged"), merge=True))
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "hf"), tmp_path / "out")
    with torch.no_grad():
        found, truth = (each(TOKENS).logits for each in (model, AutoModelForCausalLM.from_pretrained(tmp_path / "merged")))
    # 2⁻²⁴ of the largest values, through sums of about 100 products; PEFT that loads them right needs no warning
    assert ((found - truth).abs().max() <= 1e-5 * truth.abs().max()) == loads


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, "use_dora = True, which is not supported"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"bias": "all"}, "bias = all"),
        ({"peft_type": "IA3"}, "peft_type = IA3; only LORA is read"),
        ({"r": 0}, "r = 0"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights = pissa_niter_4, with which PEFT changes the base weights"),
        ({"target_parameters": ["mlp.experts.gate_up_proj"]}, "target_parameters = "),
        ({"r": 4}, r"is \[3, 64\], but \[4, 64\]"),
    ],
)
def test_what_peft_has_and_we_do_not_is_refused(
    base: Path, peft: tuple[Path, Tensor], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "peft"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes((peft[0] / "adapter_model.safetensors").read_bytes())
    settings = json.loads((peft[0] / "adapter_config.json").read_text()) | change
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(ConfigError, match=message):
        convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out"), base=str(base / "megatron")))
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_refused(base: Path, peft: tuple[Path, Tensor], tmp_path: Path) -> None:
    """By its shapes for PEFT's, by the weights' digest for ours."""
    save_model(tmp_path / "hf", model_type="qwen2", tied=True, num_hidden_layers=2, seed=3)
    convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "other")))
    convert(ConvertConfig(input=str(peft[0]), output=str(tmp_path / "adapter"), base=str(base / "megatron")))
    with pytest.raises(ConfigError, match=r"whose weights have the digest .*other holds other weights"):
        convert(
            ConvertConfig(input=str(tmp_path / "adapter"), output=str(tmp_path / "out"), merge=True, base=str(tmp_path / "other"))
        )
    save_model(tmp_path / "deep-hf", model_type="qwen2", tied=True, num_hidden_layers=3)
    convert(ConvertConfig(input=str(tmp_path / "deep-hf"), output=str(tmp_path / "deep")))
    with pytest.raises(ConfigError, match="weights are missing"):
        convert(ConvertConfig(input=str(peft[0]), output=str(tmp_path / "out"), base=str(tmp_path / "deep")))
    with pytest.raises(ConfigError, match="is a PEFT adapter; set base to its base model's"):
        convert(ConvertConfig(input=str(peft[0]), output=str(tmp_path / "out")))
    with pytest.raises(ConfigError, match="is a whole model, not an adapter"):
        convert(ConvertConfig(input=str(base / "megatron"), output=str(tmp_path / "out"), merge=True))


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

"""Folders of adapters: read from PEFT, written for PEFT, merged, and refused."""

from __future__ import annotations

import json
import resource
import shutil
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
    LoraConfig,
)
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.families import load_family
from mpo_megatron.families.adapters import Adapter, choose_adapter
from mpo_megatron.files import digests
from mpo_megatron.hf.adapter import read_adapter
from mpo_megatron.hf.identity import is_adapter_folder, weights_digest
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_adapter import peft_settings
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.weight_map import build_adapter_map
from tests.distributed.adapters import start_matrix
from tests.tiny import save_model
from tests.unit.model.adapted import TOKENS, save_base, save_peft, token_logps


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
    save_file(after, tmp_path / "library", metadata={"format": "pt"})
    assert (out / "adapter_model.safetensors").read_bytes() == (tmp_path / "library").read_bytes()


@pytest.mark.parametrize("merge", [False, True])
def test_a_full_disk_leaves_nothing_of_an_export(merge: bool, base: Path, peft: tuple[Path, Tensor], tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk; the same command then succeeds."""
    (tmp_path / "outputs").mkdir()
    megatron, out = tmp_path / "adapter", tmp_path / "outputs" / "out"
    convert(ConvertConfig(input=str(peft[0]), output=str(megatron), base=str(base / "megatron")))
    export = ConvertConfig(input=str(megatron), output=str(out), merge=merge)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(ConfigError, match=r"output = .*out: File too large while writing .* GiB of weights; free space and"):
            convert(export)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(out.parent.iterdir())
    convert(export)


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
        ours, theirs = (token_logps(model, tokens) for model in (rounded, exact))
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


def test_a_weight_of_an_adapter_under_another_name_is_named_with_its_file(
    base: Path, peft: tuple[Path, Tensor], tmp_path: Path
) -> None:
    shutil.copytree(peft[0], tmp_path / "peft")
    path = tmp_path / "peft" / "adapter_model.safetensors"
    weights = load_file(path)
    weights["other"] = weights.pop(min(weights))
    save_file(weights, path)
    with pytest.raises(ConfigError, match=rf"^{path}: 1 of \d+ weights belong to no layer .*: other; "):
        convert(ConvertConfig(input=str(path.parent), output=str(tmp_path / "out"), base=str(base / "megatron")))


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


def test_a_broken_tokenizer_of_the_base_is_named(
    base: Path, peft: tuple[Path, Tensor], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is copied beside the adapter, in both directions."""
    shutil.copytree(base / "megatron", tmp_path / "megatron")
    (tmp_path / "megatron" / "hf" / "tokenizer.json").write_text("{}")
    (tmp_path / "megatron" / digests.LIST).unlink()
    digests.write_list(tmp_path / "megatron")
    convert(ConvertConfig(input=str(peft[0]), output=str(tmp_path / "in"), base=str(tmp_path / "megatron")))
    convert(ConvertConfig(input=str(tmp_path / "in"), output=str(tmp_path / "out")))
    error = capsys.readouterr().err
    for folder in ("megatron", "in"):
        assert f"warning: tokenizer = {tmp_path / folder / 'hf'}; tokenizer.json does not hold a tokenizer" in error

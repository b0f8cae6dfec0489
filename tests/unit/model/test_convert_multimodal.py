"""Conversion of multimodal Qwen3.5: its text model is trained; all other weights are returned unchanged, or dropped."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    Qwen3_5Config,
    Qwen3_5MoeConfig,
    Qwen3NextConfig,
)

from mpo_megatron.config import ConfigError, ConvertConfig
from mpo_megatron.families import load_family, read_family
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.files.digests import write_list
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_adapter import peft_settings, read_peft
from mpo_megatron.model.weight_map import build_adapter_map

TEXT: dict[str, Any] = {
    **{"vocab_size": 203, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    **{"head_dim": 16, "layer_types": ["linear_attention", "full_attention"], "tie_word_embeddings": False},
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8, "linear_value_head_dim": 4},
}
EXPERTS = {
    **{"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 12},
}
VISION = {
    **{"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4},
    "num_position_embeddings": 16,
}
PREDICTING = "mtp.layers.0.input_layernorm.weight"


def multimodal(kind: str = "dense") -> PretrainedConfig:
    if kind == "dense":
        return Qwen3_5Config(text_config={**TEXT, "intermediate_size": 48}, vision_config=dict(VISION))
    return Qwen3_5MoeConfig(text_config={**TEXT, **EXPERTS}, vision_config=dict(VISION))


def read(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> bool:
    return first.keys() == second.keys() and all(
        torch.equal(tensor, second[name]) and tensor.dtype == second[name].dtype for name, tensor in first.items()
    )


def save(folder: Path, kind: str = "dense") -> Path:
    """A random checkpoint with a vision tower and a layer for multi-token prediction."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(multimodal(kind), dtype=torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    save_file({**read(folder), PREDICTING: torch.randn(32)}, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "preprocessor_config.json").write_text("{}\n")
    return folder


def run(source: Path, output: Path, **options: Any) -> Path:
    convert(ConvertConfig(input=str(source), output=str(output), **options))
    return output


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(tmp_path_factory.mktemp("dense") / "hf")


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_all_weights_come_back(kind: str, tmp_path: Path) -> None:
    source = save(tmp_path / "hf", kind)
    back = run(run(source, tmp_path / "megatron"), tmp_path / "back", max_shard_gib=1e-5)
    assert any("visual" in name for name in read(source))
    assert identical(read(source), read(back))
    for name in ("config.json", "preprocessor_config.json"):
        assert (source / name).read_bytes() == (back / name).read_bytes()


def test_dropped_it_is_the_text_model_alone(dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    back = run(run(dense, tmp_path / "megatron", others="drop"), tmp_path / "back")
    assert "(mtp, visual) are dropped" in capsys.readouterr().err
    text = {
        name.replace("language_model.", ""): tensor
        for name, tensor in read(dense).items()
        if name != PREDICTING and "visual" not in name
    }
    assert identical(text, read(back))
    ours, theirs = (AutoModelForCausalLM.from_pretrained(folder, dtype="auto") for folder in (back, dense))
    assert identical(ours.state_dict(), theirs.state_dict())
    settings = json.loads((back / "config.json").read_text())
    assert settings["model_type"] == "qwen3_5_text"
    assert settings["architectures"] == ["Qwen3_5ForCausalLM"]
    # `transformers` saves a text model that it took out of a multimodal one under the names it had there.
    theirs.save_pretrained(tmp_path / "again")
    assert any(name.startswith("model.language_model.") for name in read(tmp_path / "again"))
    assert identical(text, read(run(run(tmp_path / "again", tmp_path / "megatron-again"), tmp_path / "back-again")))


def test_a_run_s_checkpoint_finds_them_where_training_began(dense: Path, tmp_path: Path) -> None:
    first = run(dense, tmp_path / "megatron")
    step = tmp_path / "step"
    shutil.copytree(first, step, ignore=shutil.ignore_patterns("others"))
    write_list(step)
    assert identical(read(dense), read(run(step, tmp_path / "back")))
    (file,) = (first / "others").glob("*.safetensors")
    changed = load_file(file)
    changed[PREDICTING] += 1
    save_file(changed, file)
    with pytest.raises(ConfigError, match="differ from the converted ones"):
        run(step, tmp_path / "changed")
    shutil.move(first / "others", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=r"others: no such folder; .* Copy it to .*step/others"):
        run(step, tmp_path / "missing")


TOKENS = torch.tensor([[5, 9, 2, 77, 31, 8, 8, 60]])


def test_the_whole_model_answers_as_before(dense: Path, tmp_path: Path) -> None:
    """Loaded as a multimodal model, from a folder in which all other files are the same."""
    for name in ("generation_config.json", "video_preprocessor_config.json", "chat_template.jinja"):
        (dense / name).write_text("{}\n")
    back = run(run(dense, tmp_path / "megatron"), tmp_path / "back")
    files = {path.name: path.read_bytes() for path in dense.iterdir() if path.suffix != ".safetensors"}
    assert {name: (back / name).read_bytes() for name in files} == files
    ours, theirs = (AutoModelForImageTextToText.from_pretrained(folder).eval() for folder in (back, dense))
    with torch.no_grad():
        assert torch.equal(ours(input_ids=TOKENS).logits, theirs(input_ids=TOKENS).logits)


PATCHES = "model.visual.patch_embed.proj.weight"
DAMAGED: dict[str, tuple[dict[str, Tensor | None], str]] = {
    "a weight of the vision tower is missing": ({PATCHES: None}, rf"1 of .* 21 weights are missing: {PATCHES}; .*--others drop"),
    "another shape": ({PATCHES: torch.zeros(2, 3)}, rf"{PATCHES} is \[2, 3\], but \[16, 3, 2, 4, 4\] by config"),
    "a single number": ({"mtp.scale": torch.tensor(1.0)}, "is a single number; .*--others drop"),
    "not of this model": ({"model.audio.weight": torch.zeros(2, 3)}, "unknown to the Megatron model .* model.audio.weight"),
    "integers": ({"mtp.ids": torch.arange(4)}, "has dtype I64"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_other_weights_are_refused(case: str, dense: Path, tmp_path: Path) -> None:
    changes, message = DAMAGED[case]
    source = tmp_path / "hf"
    shutil.copytree(dense, source)
    weights = {name: tensor for name, tensor in (read(dense) | changes).items() if tensor is not None}
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=message):
        run(source, tmp_path / "megatron")
    assert not (tmp_path / "megatron").exists()
    if "--others" in message:
        run(source, tmp_path / "megatron", others="drop")


def test_odd_values_outside_the_language_model_are_reported(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(dense, source)
    weights = read(dense)
    weights[PATCHES].view(-1)[:2] = float("nan")
    weights[PREDICTING][0] = float("inf")
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    for start, end in ((source, "megatron"), (tmp_path / "megatron", "back")):
        run(start, tmp_path / end)
        printed = capsys.readouterr().err
        assert f"WARNING: {start}: 3 values are NaN or infinite, in " in printed
        assert PATCHES in printed
        assert PREDICTING in printed
    assert int(read(tmp_path / "back")[PATCHES].isnan().sum()) == 2
    run(source, tmp_path / "dropped", others="drop")
    assert "NaN" not in capsys.readouterr().err


@pytest.mark.parametrize(("field", "number", "missing"), [("mtp_num_hidden_layers", 1, 0), ("num_nextn_predict_layers", 3, 2)])
def test_layers_for_further_tokens_without_weights_are_reported(
    field: str, number: int, missing: int, dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "hf"
    shutil.copytree(dense, source)
    config = json.loads((source / "config.json").read_text())
    config["text_config"][field] = number
    (source / "config.json").write_text(json.dumps(config))
    run(source, tmp_path / "kept")
    warning = (
        f"{missing} of the {number} layers for multi-token prediction that config.json names have no weights (mtp.layers.1.*)"
    )
    assert (warning in capsys.readouterr().err) == (missing > 0)
    run(source, tmp_path / "dropped", others="drop")
    text = run(tmp_path / "dropped", tmp_path / "text")
    assert json.loads((text / "config.json").read_text())[field] == 0
    run(text, tmp_path / "again")
    assert "multi-token" not in capsys.readouterr().err.rpartition("Megatron → Hugging Face")[2]


def test_a_vision_tower_is_compared_only_under_the_names_of_transformers(dense: Path, tmp_path: Path) -> None:
    """Another version may have renamed its weights."""
    source = tmp_path / "hf"
    shutil.copytree(dense, source)
    weights = read(dense)
    weights[PATCHES.replace("proj", "projection")] = weights.pop(PATCHES)
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    assert identical(weights, read(run(run(source, tmp_path / "megatron"), tmp_path / "back")))


def test_others_are_chosen_on_the_way_in(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"others = drop, but .* conversions to Megatron only"):
        run(run(dense, tmp_path / "megatron"), tmp_path / "back", others="drop")


NEXT = Qwen3NextConfig(**TEXT, **EXPERTS, intermediate_size=48)
REFUSED: dict[str, tuple[PretrainedConfig, dict[str, Any], str]] = {
    "a field of the text model": (multimodal(), {"text_config.attention_bias": True}, "attention_bias = True"),
    "an unknown field": (multimodal(), {"text_config.linear_gate": "swish"}, "linear_gate = 'swish' is unknown"),
    "an unknown field outside": (multimodal(), {"audio_config": {"depth": 1}}, "audio_config"),
    "no gate": (multimodal(), {"text_config.attn_output_gate": False}, "attn_output_gate = False"),
    "another dtype of states": (NEXT, {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype = 'bfloat16'"),
    "another gate": (multimodal(), {"text_config.output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid'"),
    "two answers": (multimodal(), {"tie_word_embeddings": True}, "tie_word_embeddings = True, but False in text_config"),
    "layers for further tokens": (NEXT, {"mtp_num_hidden_layers": -1}, "mtp_num_hidden_layers = -1"),
    "a kind of layer": (NEXT, {"layer_types": ["linear_attention", "mamba"]}, "layer_types has 'mamba'"),
    "too few layers": (NEXT, {"layer_types": ["full_attention"]}, "layer_types names 1 layers, but num_hidden_layers = 2"),
    "heads": (NEXT, {"linear_num_key_heads": 3}, "linear_num_key_heads = 3 does not divide linear_num_value_heads = 4"),
    "no taps": (NEXT, {"linear_conv_kernel_dim": 0}, "linear_conv_kernel_dim = 0"),
    "an activation": (NEXT, {"hidden_act": "gelu_pytorch_tanh"}, "hidden_act = 'gelu_pytorch_tanh'"),
    "an odd share of a head": (
        NEXT,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.2}},
        "partial_rotary_factor = 0.2 of 16 channels",
    ),
    "experts with probabilities as they are": (
        multimodal("experts"),
        {"text_config.norm_topk_prob": False},
        "norm_topk_prob = False",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_not_represented_is_refused_by_name(case: str) -> None:
    config, changes, message = REFUSED[case]
    changed = copy.deepcopy(config)
    for name, value in changes.items():
        outer, _, field = name.rpartition(".")
        setattr(getattr(changed, outer) if outer else changed, field, value)
    with pytest.raises(ConfigError) as error:
        read_family(changed)
    assert message in str(error.value)


def test_published_fields_are_read(tmp_path: Path) -> None:
    """Those that published files have beyond what `transformers` writes."""
    config = multimodal().to_dict() | {"language_model_only": False}
    config["vision_config"] |= {"deepstack_visual_indexes": [], "model_type": "qwen3_5"}
    config["text_config"] |= {
        **{"model_type": "qwen3_5", "mlp_only_layers": [], "tie_word_embeddings": False},  # each in some files
        **{"attn_output_gate": True, "mamba_ssm_dtype": "float32", "full_attention_interval": 4, "mtp_num_hidden_layers": 1},
        **{"mtp_use_dedicated_embeddings": False, "partial_rotary_factor": 0.25, "output_gate_type": "swish"},
        "rope_parameters": {
            **{"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
            **{"mrope_interleaved": True, "mrope_section": [1, 1, 0]},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    family = load_family(tmp_path)
    assert family.rotary_channels == 4
    assert [family.has_state(layer) for layer in range(2)] == [True, False]
    assert family.difference(read_family(multimodal())) == "ropes"  # of 10⁷, not of 10⁴


@pytest.mark.parametrize(("trained_on", "advice"), [("text", "--others drop"), ("whole", "--others keep")])
def test_an_adapter_of_the_other_form_is_explained(trained_on: str, advice: str, tmp_path: Path) -> None:
    """PEFT's names contain `language_model` only if the whole multimodal model was loaded."""
    whole = read_family(multimodal())
    families = {"whole": whole, "text": read_family(whole.config)}
    own = families.pop(trained_on)
    adapter = Adapter(rank=2, alpha=4.0, rslora=False, target_modules=("in_proj_z", "q_proj"))
    shapes = {part.name: part.shape for item in build_adapter_map(own, adapter, own.vocab_size) for part in item.placements}
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(peft_settings(adapter, "base")))
    assert read_peft(tmp_path, own)[0] == adapter
    (other,) = families.values()
    with pytest.raises(ConfigError, match=rf"belong to no layer .*{advice}"):
        read_peft(tmp_path, other)

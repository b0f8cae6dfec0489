"""Checkpoints that are damaged, of another kind, or of a variant: refused with the cause, where `transformers` would
refuse them or compute something else."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConfigError, ConvertConfig
from mpo_megatron.families import load_family
from mpo_megatron.model.convert import convert
from tests.tiny import save_model

Weights = dict[str, torch.Tensor]
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64, "rope_theta": 5e5}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A complete checkpoint of each model type that the cases need."""
    root = tmp_path_factory.mktemp("whole")
    sizes: dict[str, dict[str, Any]] = {
        **{kind: {"num_hidden_layers": 1} for kind in ("llama", "mixtral", "qwen3_moe")},
        **dict.fromkeys(("gemma2", "gemma3_text", "olmo3"), WINDOWS),
    }
    return {kind: save_model(root / kind, model_type=kind, hidden_size=32, **options) for kind, options in sizes.items()}


def with_fields(source: Path, target: Path, fields: dict[str, Any]) -> Path:
    """A copy of a checkpoint's configuration with other fields; `...` removes one."""
    target.mkdir()
    settings = json.loads((source / "config.json").read_text()) | fields
    kept = {name: value for name, value in settings.items() if value is not ...}
    (target / "config.json").write_text(json.dumps(kept))
    return target


@pytest.mark.parametrize(
    ("kind", "fields", "message"),
    [
        ("llama", {"num_key_value_heads": 0}, r"num_key_value_heads = 0; no model has this value"),
        ("llama", {"num_key_value_heads": 3}, r"num_key_value_heads = 3 does not divide num_attention_heads = 4"),
        ("llama", {"num_attention_heads": 0}, r"num_attention_heads = 0; no model has this value"),
        ("llama", {"num_hidden_layers": 10**7}, r"num_hidden_layers = 10000000; no model has this value"),
        ("llama", {"head_dim": -8}, r"head_dim = -8; no model has this value"),
        ("llama", {"max_position_embeddings": 0}, r"max_position_embeddings = 0; no model has this value"),
        ("llama", {"rms_norm_eps": -1.0}, r"rms_norm_eps = -1.0; it must be a small number >= 0"),
        ("llama", {"dtype": "banana"}, r"config.json: .*banana"),
        ("llama", {"dtype": "float8_e4m3fn"}, r"dtype = torch.float8_e4m3fn; weights must be float32"),
        ("llama", {"quantization_config": "junk"}, r"config.json: .*check or copy the file again"),
        ("llama", {"model_type": ["llama"]}, r"model_type = \['llama'\] is not supported"),
        ("llama", {"model_type": "gemma3", "text_config": {}}, r"model_type = 'gemma3' .*; it contains a text model"),
        ("llama", {"mlp_bias": True}, r"mlp_bias = True"),
        ("llama", {"attention_bias": True}, r"attention_bias = True"),
        ("llama", {"logit_scale": 0.5}, r"logit_scale = 0.5 is unknown to LlamaConfig"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, r"needs? .*factor|keys .*factor"),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": "2", "rope_theta": 1e4}}, r"factor = '2' of the rotary"),
        ("llama", {"rope_parameters": {"rope_theta": "x"}}, r"rope_theta = 'x' of the rotary embedding must be a positive"),
        ("llama", {"rope_parameters": {"rope_theta": -1.0}}, r"rope_theta = -1.0 of the rotary"),
        (
            "llama",
            {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [1]}},
            r"mrope_section = \[1\] .* is not supported with",
        ),
        ("llama", {"rope_parameters": {"rope_type": ["linear"], "factor": 2.0}}, r"rope_type = \['linear'\] is not supported"),
        ("gemma2", {"query_pre_attn_scalar": 0}, r"query_pre_attn_scalar = 0; it must be positive"),
        ("olmo3", {"layer_types": ["chunked_attention", "full_attention"]}, r"layer_types has 'chunked_attention'"),
        ("qwen3_moe", {"decoder_sparse_step": 0}, r"decoder_sparse_step = 0; it must be 1 or more"),
        ("mixtral", {"num_experts_per_tok": 5}, r"num_experts_per_tok = 5 of num_local_experts = 4"),
    ],
)
def test_fields_that_no_model_has(
    folders: dict[str, Path], tmp_path: Path, kind: str, fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load_family(with_fields(folders[kind], tmp_path / "changed", fields))


@pytest.mark.parametrize(
    ("kind", "rope"),
    [
        ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": ...}),
        ("llama", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "rope_parameters": ..., "rope_theta": 5e5}),
        ("olmo3", {"rope_parameters": YARN}),
        ("olmo3", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": ..., "rope_theta": 5e5}),
        ("gemma3_text", {"rope_parameters": YARN}),
        ("gemma3_text", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "rope_parameters": ..., "rope_theta": 1e6}),
        ("gemma2", {"rope_parameters": YARN}),
    ],
)
def test_rotary_embeddings_in_old_and_new_forms(
    folders: dict[str, Path], tmp_path: Path, kind: str, rope: dict[str, Any]
) -> None:
    family = load_family(with_fields(folders[kind], tmp_path / "changed", rope))
    buffers = dict(AutoModelForCausalLM.from_config(family.config).model.rotary_emb.named_buffers())
    kinds = getattr(family.config, "layer_types", None) or ["full_attention"] * family.num_hidden_layers
    for layer, attention in zip(kinds, family.attention, strict=True):
        theirs = buffers.get(f"{layer}_inv_freq", buffers.get("inv_freq"))
        assert theirs is not None
        assert torch.equal(torch.tensor(family.ropes[attention.rope].inverse_frequencies), theirs)


def renamed(prefix: str) -> Callable[[Weights], Weights]:
    return lambda weights: {prefix + name: weight for name, weight in weights.items()}


def added(name: str) -> Callable[[Weights], Weights]:
    return lambda weights: weights | {name: torch.ones(1)}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (renamed("policy."), r"weight names start with 'policy\.' .*: they belong to a larger model"),
        (renamed("language_model."), r"weight names start with 'language_model\.'"),
        (added("model.layers.0.mlp.up_proj.weight_scale_inv"), r"holds quantized weights \(.*weight_scale_inv\)"),
        (added("model.layers.0.mlp.up_proj.qweight"), r"holds quantized weights"),
        (added("model.layers.0.self_attn.q_proj.bias"), r"1 weights are unknown .*q_proj\.bias"),
        (lambda weights: weights | {"lm_head.weight": ...}, r"lm_head\.weight; copy .* set tie_word_embeddings to true"),
        (lambda weights: weights | {"model.norm.weight": ...}, r"model\.norm\.weight; copy .* use the config\.json of these"),
    ],
)
def test_weights_of_another_kind(
    folders: dict[str, Path], tmp_path: Path, change: Callable[[Weights], dict[str, Any]], message: str
) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "changed"))
    weights = {name: weight for name, weight in change(load_file(folder / "model.safetensors")).items() if weight is not ...}
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ConfigError, match=message):
        convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.fp16.safetensors", r"has model\.fp16\.safetensors, but neither .*; rename it"),
        ("consolidated.safetensors", r"has only consolidated\.safetensors, its author's own format"),
    ],
)
def test_files_under_other_names(folders: dict[str, Path], tmp_path: Path, name: str, message: str) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "changed"))
    (folder / "model.safetensors").rename(folder / name)
    with pytest.raises(ConfigError, match=message):
        convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"architectures": "LlamaForCausalLM"}, r"architectures = 'LlamaForCausalLM'; it must be a list"),
        ({"architectures": [3]}, r"architectures = \[3\]; it must be a list"),
        ({"architectures": ["LlamaForRewardModel"]}, r"a reward model or classifier"),
        ({"pad_token_id": 10**6}, r"pad_token_id = 1000000 in config\.json is outside the embedding's 264 rows"),
        ({"vocab_size": 10}, r"model\.embed_tokens\.weight is \[264, 32\] .* but \[10, 32\] by config\.json"),
    ],
)
def test_configurations_of_another_kind(folders: dict[str, Path], tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    folder = with_fields(folders["llama"], tmp_path / "changed", fields)
    for path in folders["llama"].iterdir():
        if path.name != "config.json":
            shutil.copy(path, folder)
    with pytest.raises(ConfigError, match=message):
        convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out")))


def test_tensors_that_overlap(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(folders["llama"], tmp_path / "changed"))
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    norms = [name for name in header if name.endswith("layernorm.weight")]
    header[norms[0]]["data_offsets"] = header[norms[1]]["data_offsets"]
    text = json.dumps(header).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    with pytest.raises(ConfigError, match=r"does not start where the tensor before it ends"):
        convert(ConvertConfig(input=str(folder), output=str(tmp_path / "out")))

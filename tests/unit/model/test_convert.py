"""Conversion: round trips are exact, and every inconvertible input is refused with the reason."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    Olmo2Config,
    Olmo3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3_5TextConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

from mpo_megatron.config import ConfigError, ConvertConfig
from mpo_megatron.files import digests
from mpo_megatron.hf.conversion import CheckpointError, load_conversion
from mpo_megatron.model.convert import convert, export_to_hf, import_from_hf
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.model.safetensors_io import INDEX, PlannedTensor, list_tensors, plan_shards, write_shards
from tests.waiting import TIMEOUT

SIZES = {
    "vocab_size": 1003,  # not divisible by any parallel size
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "tie_word_embeddings": False}
DELTA_NET = {
    **{"linear_num_key_heads": 2, "linear_num_value_heads": 6, "linear_key_head_dim": 8, "linear_value_head_dim": 4},
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
}
MODELS: dict[str, PretrainedConfig] = {
    "qwen2": Qwen2Config(**SIZES, tie_word_embeddings=False),
    "qwen2.5-tied": Qwen2Config(**SIZES, tie_word_embeddings=True, rope_theta=1e6),
    "qwen2-one-group": Qwen2Config(**{**SIZES, "num_key_value_heads": 1}, tie_word_embeddings=False),
    "qwen2-no-groups": Qwen2Config(**{**SIZES, "num_key_value_heads": 4}, tie_word_embeddings=True),
    "qwen3": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),  # head_dim ≠ hidden / heads
    "qwen3-tied": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=True),
    "qwen3-moe": Qwen3MoeConfig(**SIZES, **EXPERTS, head_dim=32),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "mistral": MistralConfig(**SIZES, sliding_window=8),
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "gemma2": Gemma2Config(**SIZES, head_dim=32),
    "gemma3": Gemma3TextConfig(**SIZES, head_dim=32),
    "olmo2": Olmo2Config(**SIZES),
    "olmo3": Olmo3Config(**SIZES),
    "qwen3.5": Qwen3_5TextConfig(**SIZES, **DELTA_NET, head_dim=32, tie_word_embeddings=True),
    "qwen3-next": Qwen3NextConfig(**SIZES, **DELTA_NET, **EXPERTS, head_dim=32, shared_expert_intermediate_size=80),
    "qwen2-moe": Qwen2MoeConfig(**SIZES, **EXPERTS, shared_expert_intermediate_size=80, mlp_only_layers=[0]),
}
SIDE_FILES = {
    "tokenizer.json": b'{"model": {"type": "BPE"}}\n',
    "tokenizer_config.json": '{"pad": "…"}'.encode(),
    "chat_template.jinja": b"{{ messages }}\r\n",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
    "LICENSE": b"\xff\x00 any bytes",
}


def write_hf(folder: Path, config: PretrainedConfig, dtype: torch.dtype = torch.bfloat16, shard: str = "60KB") -> Path:
    """A random checkpoint in Hugging Face format, with side files."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # norms and biases too: ones and zeros would hide a swap
    model.to(dtype).save_pretrained(folder, max_shard_size=shard)
    for name, content in SIDE_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def read_hf(folder: Path) -> dict[str, Tensor]:
    """All tensors, through the safetensors library."""
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def assert_identical(first: dict[str, Tensor], second: dict[str, Tensor]) -> None:
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype, name
        assert torch.equal(tensor.view(torch.uint8), second[name].view(torch.uint8)), name


def convert_folder(source: Path, output: Path, **options: float) -> Path:
    convert(ConvertConfig(input=str(source), output=str(output), **options))  # type: ignore[arg-type]
    return output


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint in several files, for tests that only read it."""
    return write_hf(tmp_path_factory.mktemp("qwen3") / "hf", MODELS["qwen3"])


@pytest.fixture
def hf(qwen3: Path, tmp_path: Path) -> Path:
    """A copy of it, for tests that damage it."""
    return copy(qwen3, tmp_path / "hf")


def copy(source: Path, target: Path) -> Path:
    subprocess.run(["cp", "-r", source, target], check=True)
    return target


# --------------------------------------------------------------------------------------------------- round trips


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MODELS)
def test_round_trip_is_bit_identical(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", MODELS[name], dtype)
    megatron = convert_folder(hf, tmp_path / "megatron")
    back = convert_folder(megatron, tmp_path / "back", max_shard_gib=1e-4)

    assert_identical(read_hf(hf), read_hf(back))
    for file in [*SIDE_FILES, "config.json", "generation_config.json"]:
        assert (back / file).read_bytes() == (hf / file).read_bytes(), file
    record = load_conversion(megatron)
    assert (record.vocab_size, record.padded_vocab_size) == (1003, 1024)
    assert record.dtype == str(dtype).removeprefix("torch.")
    loaded = AutoModelForCausalLM.from_pretrained(back, dtype="auto")
    assert loaded.dtype == dtype


@pytest.mark.parametrize("max_chunk_bytes", [300, 10**9])
def test_chunk_size_changes_no_weight_and_no_digest(qwen3: Path, tmp_path: Path, max_chunk_bytes: int) -> None:
    import_from_hf(qwen3, tmp_path / "default", vocab_multiple=1)
    import_from_hf(qwen3, tmp_path / "cut", vocab_multiple=1, max_chunk_bytes=max_chunk_bytes)
    export_to_hf(tmp_path / "cut", tmp_path / "back", max_shard_bytes=10**9)
    assert_identical(read_hf(qwen3), read_hf(tmp_path / "back"))
    assert load_conversion(tmp_path / "cut").digest == load_conversion(tmp_path / "default").digest


def test_digest_sees_every_bit_but_not_how_files_are_cut(qwen3: Path, tmp_path: Path) -> None:
    def digest(folder: Path) -> str:
        return load_conversion(convert_folder(folder, folder.with_name(folder.name + "-megatron"))).digest

    whole = write_hf(tmp_path / "whole", MODELS["qwen3"], shard="1GB")
    other = copy(whole, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"].view(torch.uint8)[0] ^= 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    assert digest(copy(qwen3, tmp_path / "cut")) == digest(whole) != digest(other)


def test_padded_rows_are_zero_and_stay_inside(hf: Path, tmp_path: Path) -> None:
    megatron = convert_folder(hf, tmp_path / "megatron", vocab_multiple=96)
    reader = CheckpointReader(megatron / "megatron")
    for key in "embedding.word_embeddings.weight", "output_layer.weight":
        assert tuple(reader.tensors[key].size) == (1056, 64)
        rows = reader.read(key, [0, 0], [1056, 64])
        assert not rows[1003:].any()
        assert rows[:1003].any(dim=1).all()
    back = convert_folder(megatron, tmp_path / "back")
    assert read_hf(back)["lm_head.weight"].shape == (1003, 64)


def test_tensors_keep_their_own_dtypes(hf: Path, tmp_path: Path) -> None:
    """Norms in float32 next to bf16 matrices: every kind of weight may have its own dtype."""
    for file in hf.glob("*.safetensors"):
        tensors = load_file(file)
        save_file({k: v.float() if "norm" in k else v for k, v in tensors.items()}, file, {"format": "pt"})
    megatron = convert_folder(hf, tmp_path / "megatron")
    back = convert_folder(megatron, tmp_path / "back")
    assert_identical(read_hf(hf), read_hf(back))
    assert load_conversion(megatron).dtype == "bfloat16"


def test_stored_copy_of_a_tied_embedding_survives(tmp_path: Path) -> None:
    hf = write_hf(tmp_path / "hf", MODELS["qwen3-tied"], shard="1GB")
    tensors = load_file(hf / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    back = convert_folder(convert_folder(hf, tmp_path / "megatron"), tmp_path / "back")
    assert_identical(read_hf(hf), read_hf(back))

    tensors["lm_head.weight"][5, 5] += 1
    save_file(tensors, hf / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head.weight that differs from model.embed_tokens.weight"):
        convert_folder(hf, tmp_path / "other")


def test_export_after_training_in_another_precision_says_so_in_config(hf: Path, tmp_path: Path) -> None:
    megatron = convert_folder(hf, tmp_path / "megatron")
    record = json.loads((megatron / "conversion.json").read_text())
    (megatron / "conversion.json").write_text(json.dumps(record | {"dtype": "float32"}))  # as if it had been float32
    digests.write_list(megatron)
    back = convert_folder(megatron, tmp_path / "back")
    assert json.loads((back / "config.json").read_text())["dtype"] == "bfloat16"


def test_run_folder_exports_its_newest_complete_step(hf: Path, tmp_path: Path) -> None:
    megatron = convert_folder(hf, tmp_path / "megatron")
    steps = tmp_path / "run" / "checkpoints"
    steps.mkdir(parents=True)
    copy(megatron, steps / "step_00000020")
    for name in "step_00000100", "step_00000200.partial":
        copy(megatron, steps / name)
    (steps / "step_00000100" / "megatron" / "metadata.json").unlink()
    back = convert_folder(tmp_path / "run", tmp_path / "back")
    assert_identical(read_hf(hf), read_hf(back))
    (steps / "step_00000020" / "conversion.json").unlink()
    with pytest.raises(CheckpointError, match=r"none of its 2 checkpoints/step_\* is complete"):
        convert_folder(tmp_path / "run", tmp_path / "again")


def test_symbolic_links_are_followed(qwen3: Path, tmp_path: Path) -> None:
    """The hub's cache is a folder of links."""
    (tmp_path / "links").mkdir()
    for path in qwen3.iterdir():
        (tmp_path / "links" / path.name).symlink_to(path)
    megatron = convert_folder(tmp_path / "links", tmp_path / "megatron")
    assert not any(path.is_symlink() for path in megatron.rglob("*"))


# --------------------------------------------------------------------------------------------------- safetensors


def test_written_files_are_the_library_s(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5).bfloat16(),
        "b": torch.randn(7),  # float32 after 30 bytes: must still start at a multiple of 4
        "c": torch.randn(2, 2).half(),
        "ü": torch.randn(1, 1).bfloat16(),
    }
    planned = [PlannedTensor(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_shards(tmp_path, plan_shards(planned, 10**6), lambda item: iter(tensors[item.name].split(1)))
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert_identical({name: file.get_tensor(name) for name in file.keys()}, tensors)  # noqa: SIM118 (not a dict)
    for tensor in list_tensors(tmp_path).values():
        assert tensor.start % tensor.dtype.itemsize == 0


def test_shards_hold_at_most_their_size() -> None:
    sizes = [10, 10, 30, 50, 10, 10, 10, 10]
    planned = [PlannedTensor(str(index), torch.float32, (size,)) for index, size in enumerate(sizes)]
    shards = plan_shards(planned, 40 * 4)
    assert [[tensor.shape[0] for tensor in shard] for shard in shards] == [[10, 10], [30], [50], [10, 10, 10, 10]]


# --------------------------------------------------------------------------------------------------- bad input


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a checkpoint, and write it as one file."""
    tensors = read_hf(folder)
    change(tensors)
    for file in [*folder.glob("*.safetensors"), folder / INDEX]:
        file.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def edit_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def pickle_only(folder: Path) -> None:
    rewrite(folder, lambda tensors: None)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size - 10)


def first_shard(folder: Path) -> Path:
    return min(folder.glob("*.safetensors"))


def bad_index(folder: Path, name: str, file: str) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"][name] = file
    (folder / INDEX).write_text(json.dumps(index))


def to_float32(tensors: dict[str, Tensor], name: str) -> None:
    tensors[name] = tensors[name].float()


def rename(folder: Path, new_name: Callable[[str], str]) -> None:
    """Rename all weights."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        renamed = {new_name(name): tensor for name, tensor in tensors.items()}
        tensors.clear()
        tensors.update(renamed)

    rewrite(folder, change)


def adapter_only(folder: Path) -> None:
    (folder / "config.json").unlink()
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen2.5-7B"}')


UP = "model.layers.1.mlp.up_proj.weight"
LONGROPE = {"factor": 4.0, "short_factor": [1.0] * 8, "long_factor": [1.0] * 8, "original_max_position_embeddings": 64}
BAD_HF: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing shard": (
        lambda folder: first_shard(folder).unlink(),
        r"model-00001-of-\d+.safetensors: no such file, but model.safetensors.index.json puts \d+ tensors there \(",
    ),
    "truncated shard": (
        lambda folder: truncate(first_shard(folder)),
        r"model-00001.*: truncated or damaged: [\d,]+ bytes",
    ),
    "empty shard": (
        lambda folder: first_shard(folder).write_bytes(b""),
        r"model-00001.*: incomplete safetensors file",
    ),
    "large file of git": (
        lambda folder: first_shard(folder).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        r"model-00001.*: a Git LFS pointer instead of the weights; fetch them with `git lfs pull`",
    ),
    "garbage header": (
        lambda folder: first_shard(folder).write_bytes((20).to_bytes(8, "little") + b"{not json" + b" " * 50),
        r"model-00001.*: its safetensors header does not parse",
    ),
    "garbage index": (lambda folder: (folder / INDEX).write_text("[]"), r"index.json: not a safetensors index"),
    "index names no file": (
        lambda folder: (folder / INDEX).unlink(),
        r"has neither model.safetensors nor model.saf.*index",
    ),
    "index leaves the folder": (
        lambda folder: bad_index(folder, UP, "../secret.safetensors"),
        r"'../secret.safetensors' is not a file name in this folder",
    ),
    "index contradicts file": (
        lambda folder: bad_index(folder, "model.norm.weight", first_shard(folder).name),
        r"puts it in model-00001|model.norm.weight in model-00001.*not there",
    ),
    "missing tensor": (
        lambda folder: rewrite(folder, lambda tensors: tensors.pop(UP)),
        rf"1 of 36 weights that config.json implies are missing: {UP}; copy",
    ),
    "unknown tensor": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({"model.layers.0.extra": torch.ones(2)})),
        r"1 weights are unknown to the Megatron model that config.json describes: model.layers.0.extra\.",
    ),
    "too few layers in config": (
        lambda folder: edit_config(folder, num_hidden_layers=2, layer_types=["full_attention"] * 2),
        r"11 weights are unknown to the Megatron model.*: model.layers.2.*, …",
    ),
    "kinds of layers in config": (
        lambda folder: edit_config(folder, num_hidden_layers=2),
        r"config.json: .*`num_hidden_layers` \(2\) must be equal to the number of `layer_types` \(3\); check or copy",
    ),
    "type in config": (
        lambda folder: edit_config(folder, hidden_size="64"),
        r"config.json: .*'hidden_size' expected int, got str",
    ),
    "rope scaling": (
        lambda folder: edit_config(folder, rope_scaling={"rope_type": "longrope", **LONGROPE}),
        r"config.json: .*rope_type = 'longrope' is not supported; supported are default, linear",
    ),
    "rope scaling of older checkpoints": (
        lambda folder: edit_config(folder, rope_scaling={"type": "longrope", **LONGROPE}),
        r"config.json: .*rope_type = 'longrope' is not supported; supported are default, linear",
    ),
    "shape": (
        lambda folder: edit_config(folder, intermediate_size=128),
        r"gate_proj.weight is \[96, 64\] in .*safetensors, but \[128, 64\] by config.json",
    ),
    "two dtypes in one Megatron tensor": (
        lambda folder: rewrite(folder, lambda tensors: to_float32(tensors, UP)),
        rf"{UP} is F32, model.layers.0.mlp.gate_proj.weight is BF16; in Megatron they are one tensor",
    ),
    "quantized tensor": (
        lambda folder: rewrite(folder, lambda tensors: tensors.update({UP: tensors[UP].to(torch.float8_e4m3fn)})),
        rf"{UP} in .* has dtype F8_E4M3; weights must be F32, F16, BF16",
    ),
    "quantized config": (
        lambda folder: edit_config(folder, quantization_config={"quant_method": "fp8"}),
        r"quantization_config is set; a quantized checkpoint cannot be trained",
    ),
    "wrapped": (
        lambda folder: rename(folder, lambda name: f"module.{name}"),
        r"weight names start with 'module.' .*as DistributedDataParallel saves them",
    ),
    "compiled": (lambda folder: rename(folder, lambda name: f"_orig_mod.{name}"), r"start with '_orig_mod.' .*a compiled model"),
    "base model": (
        lambda folder: rename(folder, lambda name: name.removeprefix("model.")),
        r"holds a base model .*lm_head.weight is missing",
    ),
    "adapter beside a model": (
        lambda folder: (folder / "adapter_config.json").write_text("{}"),
        r"adapter_config.json: a LoRA adapter beside a whole model; move one of them",
    ),
    "adapter": (adapter_only, r"is a PEFT adapter; set base to its base model's Megatron checkpoint"),
    "reward model": (
        lambda folder: edit_config(folder, architectures=["Qwen2ForSequenceClassification"]),
        r"architectures = Qwen2ForSequenceClassification: a reward model or classifier",
    ),
    "reward model's weights": (
        lambda folder: rename(folder, lambda name: name.replace("lm_head.", "score.")),
        r"holds a reward model or classifier \(score.weight\), not a language model",
    ),
    "unknown field": (lambda folder: edit_config(folder, residual_scale=0.5), r"residual_scale = 0.5 is unknown to Qwen"),
    "bias": (
        lambda folder: edit_config(folder, attention_dropout=0.1),
        r"attention_dropout = 0.1 .*must be deterministic; set 0",
    ),
    "pickles": (pickle_only, r"only as pickles \(pytorch_model.bin\).*save_pretrained\(NEW_FOLDER\)"),
    "layers of another kind": (
        lambda folder: edit_config(folder, layer_types=["full_attention"] * 2 + ["chunked_attention"]),
        r"config.json: .*chunked_attention",
    ),
    "architecture": (lambda folder: edit_config(folder, model_type="gpt2"), r"model_type = 'gpt2' is not supported"),
    "no config": (
        lambda folder: (folder / "config.json").unlink(),
        r"neither a Hugging Face checkpoint \(no config.json\)",
    ),
}


@pytest.mark.parametrize("case", BAD_HF)
def test_bad_hugging_face_checkpoint(case: str, hf: Path, tmp_path: Path) -> None:
    damage, message = BAD_HF[case]
    damage(hf)
    with pytest.raises(ConfigError, match=message):
        convert_folder(hf, tmp_path / "megatron")
    assert os.listdir(tmp_path) == ["hf"]


def edit_record(folder: Path, **fields: object) -> None:
    path = folder / "conversion.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


BAD_MEGATRON: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing file": (
        lambda folder: (folder / "megatron/__0_0.distcp").unlink(),
        r"__0_0.distcp: no such file, but the check",
    ),
    "truncated file": (
        lambda folder: truncate_half(folder / "megatron/__0_0.distcp"),
        r"__0_0.distcp: truncated: [\d,]+ bytes",
    ),
    "missing metadata": (
        lambda folder: (folder / "megatron/.metadata").unlink(),
        r".metadata: no such file; .* incomplete",
    ),
    "interrupted save": (
        lambda folder: (folder / "megatron/metadata.json").unlink(),
        r"metadata.json: no such file; .* incomplete",
    ),
    "damaged metadata": (lambda folder: truncate(folder / "megatron/.metadata"), r".metadata: damaged"),
    "damaged data": (lambda folder: overwrite(folder / "megatron/__0_0.distcp"), r"the data of .* is damaged"),
    "no record": (lambda folder: (folder / "conversion.json").unlink(), r"conversion.json: no such file"),
    "foreign record": (lambda folder: edit_record(folder, surprise=1), r"conversion.json: does not parse \(.*surprise"),
    "no side files": (lambda folder: (folder / "hf/config.json").unlink(), r"hf/config.json: no such file"),
    "other vocabulary": (
        lambda folder: edit_record(folder, padded_vocab_size=2048),
        r"embedding.word_embeddings.weight is \[1024, 64\] in .*, but \[2048, 64\] according to hf/config.json and conv",
    ),
    "other model": (
        lambda folder: edit_config(folder / "hf", num_hidden_layers=5, layer_types=["full_attention"] * 5),
        r"layer_norm_weight is \[3, 64\] in .*, but \[5, 64\]",
    ),
    "missing weight": (
        lambda folder: edit_config(folder / "hf", model_type="qwen2"),
        r"1 of \d+ weights of the model are missing: decoder.layers.self_attention.linear_qkv.bias",
    ),
    "unknown weight": (
        lambda folder: edit_config(folder / "hf", tie_word_embeddings=True),
        r"1 weights are unknown to the Hugging Face model that hf/config.json describes: output_layer.weight",
    ),
}


def truncate_half(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    path.write_bytes(b"\x00" * path.stat().st_size)


@pytest.mark.parametrize("case", BAD_MEGATRON)
def test_bad_megatron_checkpoint(case: str, megatron_copy: Path, tmp_path: Path) -> None:
    """What somebody wrote so: the digests are right."""
    damage, message = BAD_MEGATRON[case]
    damage(megatron_copy)
    digests.write_list(megatron_copy)
    with pytest.raises(ConfigError, match=message):
        convert_folder(megatron_copy, tmp_path / "back")
    assert os.listdir(tmp_path) == ["megatron"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("megatron/.metadata", r"\.metadata: its content differs from what was written \(the digest of 0 to .*; copy it again"),
        ("hf/tokenizer.json", r"tokenizer\.json: its content differs"),
        ("conversion.json", r"conversion\.json: its content differs"),
        (digests.LIST, r"mpo_digests\.json: damaged"),
        (None, r"megatron: has no digests .* convert it again"),
    ],
)
def test_damaged_megatron_checkpoint(name: str | None, message: str, megatron_copy: Path, tmp_path: Path) -> None:
    if name is None:
        (megatron_copy / digests.LIST).unlink()
    else:
        whole = (megatron_copy / name).read_bytes()
        (megatron_copy / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    with pytest.raises(ConfigError, match=message):
        convert_folder(megatron_copy, tmp_path / "back")
    assert os.listdir(tmp_path) == ["megatron"]


def test_damaged_export_is_not_taken_back(megatron: Path, tmp_path: Path) -> None:
    back = convert_folder(megatron, tmp_path / "back")
    path = back / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ConfigError, match=r"model\.safetensors: its content differs from what was written"):
        convert_folder(back, tmp_path / "again")


def test_side_file_that_does_not_parse_is_not_copied(hf: Path, tmp_path: Path) -> None:
    (hf / "generation_config.json").write_text('{"eos_token_id": 3')
    with pytest.raises(CheckpointError, match=r"generation_config\.json: does not parse .* copy or download it again"):
        convert_folder(hf, tmp_path / "megatron")


def test_flipped_bit_is_an_error_or_changes_no_weight(megatron_copy: Path, tmp_path: Path) -> None:
    file = megatron_copy / "megatron/__0_0.distcp"
    whole, expected = file.read_bytes(), read_hf(convert_folder(megatron_copy, tmp_path / "whole"))
    rng, caught = random.Random(0), []
    for position in rng.sample(range(len(whole)), 48):  # of weights, nearly all; also of the archives around them
        damaged = bytearray(whole)
        damaged[position] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        try:
            back = convert_folder(megatron_copy, tmp_path / f"back-{position}")
        except CheckpointError as error:
            caught.append(str(error))
        else:
            assert_identical(read_hf(back), expected)
            shutil.rmtree(back)
    assert len(caught) > 24
    assert all("__0_0.distcp, from byte" in message for message in caught)
    assert sorted(os.listdir(tmp_path)) == ["megatron", "whole"]


@pytest.fixture(scope="module")
def megatron(qwen3: Path) -> Path:
    return convert_folder(qwen3, qwen3.with_name("megatron"))


@pytest.fixture
def megatron_copy(megatron: Path, tmp_path: Path) -> Path:
    return copy(megatron, tmp_path / "megatron")


def test_output_must_be_new_and_outside(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match=r"output = .*full is not empty"):
        convert_folder(hf, tmp_path / "full")
    with pytest.raises(ConfigError, match=r"is inside input"):
        convert_folder(hf, hf / "megatron")
    with pytest.raises(ConfigError, match=r"input = .*nothing; no such folder"):
        convert_folder(tmp_path / "nothing", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    convert_folder(hf, tmp_path / "empty")


@pytest.mark.parametrize("direction", ["in", "out"])
def test_full_disk_leaves_nothing_behind(direction: str, qwen3: Path, megatron: Path, tmp_path: Path) -> None:
    """A limit on the file size stands for the full disk: the same write fails, part of the way."""
    source = qwen3 if direction == "in" else megatron
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(ConfigError, match=r"output = .*out: File too large while writing 0.00 GiB of weights; free space"):
            convert_folder(source, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not any(tmp_path.iterdir())


def test_disk_that_is_too_small_is_seen_before_writing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = __import__("shutil").disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"GiB of weights, but only 0.00 GiB are free"):
        convert_folder(hf, tmp_path / "megatron")


# --------------------------------------------------------------------------------------------------- tools


@pytest.mark.slow
def test_tools_convert_without_the_command(qwen3: Path, tmp_path: Path) -> None:
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}

    def run(tool: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, root / "tools" / tool, *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)

    done = run("convert_hf_to_megatron.py", "--input", qwen3, "--output", tmp_path / "megatron")
    assert done.returncode == 0, done.stderr
    assert "MiB/s" in done.stderr
    done = run("convert_megatron_to_hf.py", "--input", tmp_path / "megatron", "--output", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    assert_identical(read_hf(qwen3), read_hf(tmp_path / "back"))
    wrong = run("convert_megatron_to_hf.py", "--input", qwen3, "--output", tmp_path / "wrong")
    assert wrong.returncode == 1
    assert "no megatron/" in wrong.stderr
    assert "Traceback" not in wrong.stderr


def converted_back(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """All weights after both conversions."""
    convert(ConvertConfig(input=str(source), output=str(folder / "megatron")))
    convert(ConvertConfig(input=str(folder / "megatron"), output=str(folder / "back")))
    return load_all(folder / "back")


def load_all(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_a_single_file_comes_before_an_older_index(tmp_path: Path) -> None:
    """As transformers loads them: a folder that was saved to twice, first in shards."""
    torch.manual_seed(1)
    AutoModelForCausalLM.from_config(MODELS["qwen2"]).save_pretrained(tmp_path / "hf", max_shard_size="50KB")
    assert (tmp_path / "hf" / INDEX).is_file()
    torch.manual_seed(2)
    model = AutoModelForCausalLM.from_config(MODELS["qwen2"])
    save_file(model.state_dict(), tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    back = converted_back(tmp_path / "hf", tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").state_dict()
    assert all(torch.equal(back[name], tensor) for name, tensor in theirs.items())


def test_rotary_frequencies_in_a_checkpoint_are_ignored(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MODELS["qwen2-no-groups"])
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    model.save_pretrained(tmp_path / "hf")
    buffers = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": torch.ones(8) for layer in range(3)}
    save_file(tensors | buffers, tmp_path / "hf" / "model.safetensors")
    assert load_all(tmp_path / "hf").keys() > converted_back(tmp_path / "hf", tmp_path).keys()


def test_a_tied_base_model_is_a_whole_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MODELS["qwen2-no-groups"])
    model.save_pretrained(tmp_path / "hf")
    expected = load_all(tmp_path / "hf")
    save_file({name.removeprefix("model."): tensor for name, tensor in expected.items()}, tmp_path / "hf" / "model.safetensors")
    back = converted_back(tmp_path / "hf", tmp_path)
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_stacked_experts_are_taken_apart(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MODELS[name])
    model.save_pretrained(tmp_path / "hf")
    expected = load_all(tmp_path / "hf")
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "hf" / "model.safetensors")
    assert any(key.endswith("experts.gate_up_proj") for key in load_all(tmp_path / "hf"))
    back = converted_back(tmp_path / "hf", tmp_path)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in expected.items())


def test_weights_that_are_no_numbers_are_reported(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(hf, lambda tensors: tensors[UP].view(-1)[:3].fill_(float("nan")))
    convert(ConvertConfig(input=str(hf), output=str(tmp_path / "megatron")))
    assert "3 values of decoder.layers.mlp.linear_fc1.weight are NaN or infinite" in capsys.readouterr().err

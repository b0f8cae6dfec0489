"""Conversion: every inconvertible or damaged input, and every unusable output, is refused with the reason."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from mpo_megatron.config import ConfigError
from mpo_megatron.files import digests
from mpo_megatron.hf.conversion import CheckpointError
from mpo_megatron.model.safetensors_io import INDEX
from tests.unit.model.converting import UP, assert_identical, convert_folder, read_hf, rewrite


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
    "foreign record": (lambda folder: edit_record(folder, surprise=1), "conversion.json: field surprise is unknown"),
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


def test_a_disk_that_fills_at_a_small_file_ends_in_a_sentence(
    qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    finish = FileSystemWriter.finish

    def fill(writer: Any, *arguments: Any) -> None:
        finish(writer, *arguments)
        (Path(writer.path) / "common.pt").symlink_to("/dev/full")

    monkeypatch.setattr(FileSystemWriter, "finish", fill)
    with pytest.raises(ConfigError, match=r"output = .*out: No space left on device while writing .* free space and run"):
        convert_folder(qwen3, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_disk_that_is_too_small_is_seen_before_writing(hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = __import__("shutil").disk_usage(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ConfigError, match=r"GiB of weights, but only 0.00 GiB are free"):
        convert_folder(hf, tmp_path / "megatron")

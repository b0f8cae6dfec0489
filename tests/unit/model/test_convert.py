"""Conversion: round trips are exact; forms of checkpoints that are read."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from mpo_megatron.config import ConvertConfig
from mpo_megatron.files import digests
from mpo_megatron.hf.conversion import CheckpointError, load_conversion
from mpo_megatron.model.convert import convert
from mpo_megatron.model.convert_export import export_to_hf
from mpo_megatron.model.convert_import import import_from_hf
from mpo_megatron.model.convert_torch_dist import CheckpointReader
from mpo_megatron.model.safetensors_io import INDEX, PlannedTensor, list_tensors, plan_shards, write_shards
from tests.unit.model.converting import MODELS, SIDE_FILES, UP, assert_identical, convert_folder, copy, read_hf, rewrite, write_hf
from tests.waiting import TIMEOUT

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


# --------------------------------------------------------------------------------------------------- tools


@pytest.mark.slow
def test_tools_convert_without_the_command(qwen3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in a process of its own, as users start both; the other in this one."""
    root = Path(__file__).parents[3]
    command = [sys.executable, root / "tools" / "convert_hf_to_megatron.py", "--input", qwen3, "--output", tmp_path / "megatron"]
    environment = os.environ | {"PYTHONPATH": str(root)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    assert done.returncode == 0, done.stderr
    assert "MiB/s" in done.stderr

    def run_here(source: Path, output: Path) -> None:
        tool = str(root / "tools" / "convert_megatron_to_hf.py")
        monkeypatch.setattr(sys, "argv", [tool, "--input", str(source), "--output", str(output)])
        runpy.run_path(tool, run_name="__main__")

    run_here(tmp_path / "megatron", tmp_path / "back")
    assert_identical(read_hf(qwen3), read_hf(tmp_path / "back"))
    with pytest.raises(SystemExit, match=r"no megatron/"):
        run_here(qwen3, tmp_path / "wrong")


def converted_back(source: Path, folder: Path) -> dict[str, torch.Tensor]:
    """All weights after both conversions."""
    convert(ConvertConfig(input=str(source), output=str(folder / "megatron")))
    convert(ConvertConfig(input=str(folder / "megatron"), output=str(folder / "back")))
    return read_hf(folder / "back")


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
    assert read_hf(tmp_path / "hf").keys() > converted_back(tmp_path / "hf", tmp_path).keys()


def test_a_tied_base_model_is_a_whole_model(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MODELS["qwen2-no-groups"])
    model.save_pretrained(tmp_path / "hf")
    expected = read_hf(tmp_path / "hf")
    save_file({name.removeprefix("model."): tensor for name, tensor in expected.items()}, tmp_path / "hf" / "model.safetensors")
    back = converted_back(tmp_path / "hf", tmp_path)
    assert all(torch.equal(back[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("name", ["qwen3-moe", "mixtral"])
def test_stacked_experts_are_taken_apart(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(MODELS[name])
    model.save_pretrained(tmp_path / "hf")
    expected = read_hf(tmp_path / "hf")
    save_file({key: tensor.contiguous() for key, tensor in model.state_dict().items()}, tmp_path / "hf" / "model.safetensors")
    assert any(key.endswith("experts.gate_up_proj") for key in read_hf(tmp_path / "hf"))
    back = converted_back(tmp_path / "hf", tmp_path)
    assert back.keys() == expected.keys()
    assert all(torch.equal(back[key], tensor) for key, tensor in expected.items())


def test_weights_that_are_no_numbers_are_reported(hf: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rewrite(hf, lambda tensors: tensors[UP].view(-1)[:3].fill_(float("nan")))
    for source, output in (("hf", "megatron"), ("megatron", "back")):  # by its name in Hugging Face, on both ways
        source_path = hf if source == "hf" else tmp_path / source
        convert(ConvertConfig(input=str(source_path), output=str(tmp_path / output)))
        assert f"{source_path}: 3 values are NaN or infinite, in {UP};" in capsys.readouterr().err
    assert int(read_hf(tmp_path / "back")[UP].isnan().sum()) == 3

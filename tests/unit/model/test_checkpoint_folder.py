"""An option that names a model accepts a Hugging Face folder: converted once in the output, and reused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from mpo_megatron.config import ConfigError, ConvertConfig, ModelConfig
from mpo_megatron.hf.conversion import load_conversion
from mpo_megatron.model import convert_folder
from mpo_megatron.model.checkpoint_folder import with_megatron_checkpoints
from mpo_megatron.model.convert import convert
from tests.tiny import save_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A Hugging Face folder."""
    return save_model(tmp_path / "hf", num_hidden_layers=1, hidden_size=32)


def checkpoint_of(folder: Path, run: Path) -> Path:
    model = with_megatron_checkpoints(ModelConfig(checkpoint=str(folder)), run)
    assert model.reference is None
    return Path(model.checkpoint)


def test_a_folder_is_converted_once_and_found_again(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = checkpoint_of(folder, tmp_path / "run")
    assert found.parent == tmp_path / "run" / "converted"
    assert capsys.readouterr().out == (f"model.checkpoint = {folder} is a Hugging Face folder: converting it, once, to {found}\n")
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "by-hand")))
    assert load_conversion(found) == load_conversion(tmp_path / "by-hand")
    written = (found / "megatron" / "metadata.json").stat().st_mtime_ns
    assert checkpoint_of(folder, tmp_path / "run") == found
    assert f"using its conversion {found}" in capsys.readouterr().out
    assert (found / "megatron" / "metadata.json").stat().st_mtime_ns == written
    moved = tmp_path / "elsewhere" / "hf"
    shutil.copytree(folder, moved)
    assert checkpoint_of(moved, tmp_path / "run") == found


def test_a_folder_with_a_long_name_is_converted(folder: Path, tmp_path: Path) -> None:
    """The name of its conversion is longer than its own."""
    found = checkpoint_of(folder.rename(tmp_path / ("é" * 127)), tmp_path / "run")
    assert found.name.startswith("é" * 100 + "-")


def test_a_tokenizer_that_does_not_load_is_refused_before_the_conversion(folder: Path, tmp_path: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")
    message = r"model\.checkpoint = .*, cannot be converted: tokenizer = .*; tokenizer\.json does not hold a tokenizer"
    with pytest.raises(ConfigError, match=message):
        checkpoint_of(folder, tmp_path / "run")
    assert not [path for path in (tmp_path / "run" / "converted").iterdir() if path.is_dir()]


def test_ranks_say_nothing_of_what_is_there(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint_of(folder, tmp_path / "run")
    monkeypatch.setenv("RANK", "1")
    capsys.readouterr()
    checkpoint_of(folder, tmp_path / "run")
    assert capsys.readouterr().out == ""


def test_another_model_under_the_same_path_is_another_folder(folder: Path, tmp_path: Path) -> None:
    first = checkpoint_of(folder, tmp_path / "run")
    tokenizer = folder / "tokenizer_config.json"
    tokenizer.write_text(json.dumps({**json.loads(tokenizer.read_text()), "model_max_length": 77}))
    second = checkpoint_of(folder, tmp_path / "run")
    assert load_conversion(first).digest == load_conversion(second).digest
    assert json.loads((second / "hf" / "tokenizer_config.json").read_text())["model_max_length"] == 77
    save_model(folder, num_hidden_layers=1, hidden_size=32, seed=9)
    third = checkpoint_of(folder, tmp_path / "run")
    assert load_conversion(third).digest != load_conversion(first).digest
    assert len({first, second, third}) == 3


def test_policy_and_reference_may_be_of_either_kind(folder: Path, tmp_path: Path) -> None:
    convert(ConvertConfig(input=str(folder), output=str(tmp_path / "ours")))
    model = ModelConfig(checkpoint=str(tmp_path / "ours"), reference=str(folder))
    found = with_megatron_checkpoints(model, tmp_path / "run")
    assert found.checkpoint == str(tmp_path / "ours")
    assert Path(found.reference or "").parent == tmp_path / "run" / "converted"


def test_what_cannot_be_converted_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match=r"output = .*hf/run is inside model.checkpoint = .*hf"):
        checkpoint_of(folder, folder / "run")
    monkeypatch.setattr(convert_folder.shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(ConfigError, match=r"^model\.checkpoint = .*hf, a Hugging Face folder, .* only 0\.00 GiB are free"):
        checkpoint_of(folder, tmp_path / "run")
    assert not [path for path in (tmp_path / "run" / "converted").iterdir() if path.is_dir()]
    (folder / "model.safetensors").write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"^model\.checkpoint = .* cannot be converted: .*model\.safetensors: incomplete"):
        checkpoint_of(folder, tmp_path / "run")
    with pytest.raises(ConfigError, match="neither a Hugging Face folder"):
        checkpoint_of(tmp_path, tmp_path / "run")

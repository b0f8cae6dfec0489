"""Malformed checkpoint files: refused with a sentence that names file and field, whatever their content."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpo_megatron.config import ConfigError, ConvertConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.families import load_family
from mpo_megatron.model.convert import convert
from mpo_megatron.model.safetensors_io import read_header
from tests.tiny import save_model

DEEP = "[" * 100_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "hf", num_hidden_layers=1)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("hidden_size", value) for value in (-1, 0, 10**400, 2**31, "64", None, 1.5)),
        *(("head_dim", -2), ("vocab_size", -5), ("vocab_size", 10**15), ("num_hidden_layers", 0)),
        *(("num_hidden_layers", 10**12), ("num_attention_heads", 0), ("max_position_embeddings", -1)),
        *(("rope_theta", float("nan")), ("rms_norm_eps", float("inf")), ("rope_parameters", {"rope_theta": float("nan")})),
        *(("rope_parameters", {"rope_type": "yarn"}), ("rope_parameters", [1]), ("rope_scaling", {"type": "x"})),
        *(("model_type", []), ("model_type", 5), ("layer_types", [float("nan")])),
    ],
)
def test_impossible_fields_of_a_configuration(model: Path, tmp_path: Path, name: str, value: Any) -> None:
    shutil.copytree(model, tmp_path / "hf")
    fields = json.loads((model / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(fields | {name: value}))
    with pytest.raises(ConfigError, match=name.split("_", maxsplit=1)[0]) as caught:
        load_family(tmp_path / "hf")
    assert "config.json" in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_a_field_of_a_configuration_is_named_with_its_folder(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "hf")
    path = tmp_path / "hf" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"attention_dropout": 1.5}))
    with pytest.raises(ConfigError, match=rf"^{path}: attention_dropout = 1.5 "):
        load_family(tmp_path / "hf")


def change_header(path: Path, change: Callable[[dict[str, Any], str, str], None]) -> None:
    """Change the header of a safetensors file, given the names of the first two tensors by place."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    first, second, *_ = sorted((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"])
    change(header, first, second)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + content[8 + length :])


HEADERS: dict[str, Callable[[dict[str, Any], str, str], None]] = {
    "one tensor's bytes are another's": lambda header, first, second: header[first].update(
        data_offsets=[header[second]["data_offsets"][0], header[second]["data_offsets"][0] + header[first]["data_offsets"][1]]
    ),
    "a hole": lambda header, first, second: header.pop(first),
    "far away": lambda header, first, second: header[first].update(data_offsets=[2**62, 2**62 + 4]),
    "below 0": lambda header, first, second: header[first].update(shape=[-1], data_offsets=[4, 0]),
    "sides below 0": lambda header, first, second: header[first].update(shape=[-side for side in header[first]["shape"]]),
    "huge": lambda header, first, second: header[first].update(shape=[2**40, 2**40]),
    "no numbers": lambda header, first, second: header[first].update(shape=["a"], data_offsets=[None, True]),
    "no entry": lambda header, first, second: header.update({first: 3}),
    "metadata that is a list": lambda header, first, second: header.update(__metadata__=[]),
    "metadata that is no text": lambda header, first, second: header.update(__metadata__={"format": None}),
}


@pytest.mark.parametrize("change", HEADERS)
def test_impossible_headers_of_weights(model: Path, tmp_path: Path, change: str) -> None:
    path = tmp_path / "model.safetensors"
    shutil.copyfile(model / "model.safetensors", path)
    change_header(path, HEADERS[change])
    with pytest.raises(ConfigError, match=r"model.safetensors.*(copy|download) .*again"):
        read_header(path)


def test_what_is_nested_without_end(model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "hf")
    weights = tmp_path / "hf" / "model.safetensors"
    weights.write_bytes(struct.pack("<Q", len(DEEP)) + DEEP.encode())
    with pytest.raises(ConfigError, match="header does not parse"):
        read_header(weights)
    for name, content in (("tokenizer.json", DEEP), ("tokenizer.json", "[]"), ("tokenizer_config.json", "[1]")):
        shutil.copyfile(model / "tokenizer.json", tmp_path / "hf" / "tokenizer.json")
        (tmp_path / "hf" / name).write_text(content)
        with pytest.raises(ConfigError, match=r"cannot load it|does not hold a tokenizer"):
            load_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer_config.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"tokenizer_config.json is not valid JSON \(maximum recursion depth"):
        load_tokenizer(tmp_path / "hf")
    (tmp_path / "hf" / "config.json").write_text(DEEP)
    with pytest.raises(ConfigError, match=r"config.json: not a JSON object"):
        convert(ConvertConfig(input=str(tmp_path / "hf"), output=str(tmp_path / "out")))

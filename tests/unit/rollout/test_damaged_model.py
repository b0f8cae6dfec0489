"""A model folder that transformers cannot load is named in one sentence."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mpo_megatron.config import ConfigError, TransformersConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("model.safetensors", b""),
        ("model.safetensors", b"\0" * 64),
        ("generation_config.json", b"null"),
        ("config.json", {"hidden_size": -1}),
        ("config.json", {"hidden_size": "x"}),
    ],
)
def test_what_transformers_cannot_load_is_named(
    name: str, content: bytes | dict[str, object], tmp_path: Path, model_folder: Path
) -> None:
    folder, tokenizer = Path(shutil.copytree(model_folder, tmp_path / "model")), load_tokenizer(model_folder)
    if isinstance(content, dict):
        content = json.dumps(json.loads((folder / name).read_text()) | content).encode()
    (folder / name).write_bytes(content)
    with pytest.raises(ConfigError, match=r"model = .*; transformers cannot load it: .*; copy it again\.$"):
        EmbeddedEngine.load(folder, tokenizer, TransformersConfig(device="cpu"))


def test_a_tokenizers_config_with_a_field_of_another_type_is_named(tmp_path: Path, model_folder: Path) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | {"hidden_size": "x"}))
    with pytest.raises(ConfigError, match=r"tokenizer = .*; transformers cannot load it \(.*hidden_size"):
        load_tokenizer(folder)

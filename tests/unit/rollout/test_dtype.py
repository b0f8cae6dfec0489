"""The dtype in which a CPU generates and scores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron import device
from mpo_megatron.config import TransformersConfig
from mpo_megatron.data.tokenizer import load_tokenizer
from mpo_megatron.rollout.engines.embedded import EmbeddedEngine
from mpo_megatron.rollout.models import choose_dtype

BF16, NESTED = {"dtype": "bfloat16"}, {"text_config": {"torch_dtype": "float16"}}


@pytest.mark.parametrize(
    ("dtype", "where", "settings", "fast", "chosen"),
    [
        ("auto", "cpu", BF16, False, "float32"),
        ("auto", "cpu", NESTED, False, "float32"),
        ("auto", "cpu", BF16, True, "auto"),
        ("auto", "cpu", {"dtype": "float64"}, False, "auto"),
        ("auto", "cpu", {}, False, "auto"),
        ("auto", "cpu", {"dtype": ["bfloat16"]}, False, "auto"),  # transformers names what is wrong with it
        ("auto", "cuda", BF16, False, "auto"),
        ("auto", None, BF16, False, "auto"),
        ("bfloat16", "cpu", BF16, False, "bfloat16"),
    ],
)
def test_auto_is_float32_where_16_bits_are_slow(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    dtype: str,
    where: str | None,
    settings: dict[str, Any],
    fast: bool,
    chosen: str,
) -> None:
    monkeypatch.setattr(device, "computes_bf16", lambda: fast)
    assert choose_dtype(dtype, where, settings) == chosen
    assert ("no instructions for bfloat16" in capsys.readouterr().err) == (chosen != dtype)


@pytest.mark.parametrize(("fast", "dtype"), [(False, torch.float32), (True, torch.bfloat16)])
def test_the_engine_loads_in_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path, fast: bool, dtype: torch.dtype
) -> None:
    folder = Path(shutil.copytree(model_folder, tmp_path / "model"))
    settings = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(settings | BF16))
    monkeypatch.setattr(device, "computes_bf16", lambda: fast)
    engine = EmbeddedEngine.load(folder, load_tokenizer(model_folder), TransformersConfig(device="cpu"))
    assert engine.model.dtype == dtype

"""A checkpoint in both formats, and copies of it for tests that change them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.model.converting import MODELS, convert_folder, copy, write_hf


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model in both formats, `hf` and `megatron`, for tests of adapters."""
    from tests.unit.model.adapted import save_base  # imports Megatron-Core: seconds

    return save_base(tmp_path_factory.mktemp("base"), model_type="qwen2", tied=True, num_hidden_layers=2)


@pytest.fixture(scope="module")
def qwen3(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3 checkpoint in several files, for tests that only read it."""
    return write_hf(tmp_path_factory.mktemp("qwen3") / "hf", MODELS["qwen3"])


@pytest.fixture
def hf(qwen3: Path, tmp_path: Path) -> Path:
    """A copy of it, for tests that damage it."""
    return copy(qwen3, tmp_path / "hf")


@pytest.fixture(scope="module")
def megatron(qwen3: Path) -> Path:
    return convert_folder(qwen3, qwen3.with_name("megatron"))


@pytest.fixture
def megatron_copy(megatron: Path, tmp_path: Path) -> Path:
    return copy(megatron, tmp_path / "megatron")

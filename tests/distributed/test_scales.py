"""FP8's delayed scales come through a checkpoint to any layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from mpo_megatron.config import ConvertConfig
from mpo_megatron.model.convert import convert
from tests.distributed.launch import run_ranks
from tests.tiny import random_groups, save_groups, save_model


@pytest.mark.slow
@pytest.mark.distributed
def test_delayed_scales_on_another_layout(tmp_path: Path) -> None:
    hf = save_model(tmp_path / "hf", num_hidden_layers=2, hidden_size=32)
    convert(ConvertConfig(input=str(hf), output=str(tmp_path / "model")))
    save_groups(tmp_path / "groups", random_groups(12, seed=5), tmp_path / "hf")
    run_ranks(2, "tests.distributed.scales_worker", [str(tmp_path)])

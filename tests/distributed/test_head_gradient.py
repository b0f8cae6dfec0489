"""The output weight's gradient is added directly to Megatron's buffer: tied and untied, on every layout, overlapped or not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mpo_megatron.config import ConvertConfig
from mpo_megatron.model.convert import convert
from tests.distributed.launch import run_ranks
from tests.tiny import random_groups, save_groups, save_model
from tests.tolerances import reordered

pytestmark = pytest.mark.distributed


def test_same_gradients_as_by_way_of_autograd(tmp_path: Path) -> None:
    for name, tied in (("untied", False), ("tied", True)):
        hf = save_model(tmp_path / f"{name}-hf", tied=tied, num_hidden_layers=2, hidden_size=32)
        convert(ConvertConfig(input=str(hf), output=str(tmp_path / name)))
    save_groups(tmp_path / "groups", random_groups(6, seed=3), tmp_path / "tied-hf")
    cases = [
        {"model": model, "layout": layout, "distributed": distributed, "overlap": overlap}
        for model in ("untied", "tied")
        for layout, distributed, overlap in (
            ({"tensor": 2}, True, False),
            ({"tensor": 2, "pipeline": 1}, True, True),
            ({"pipeline": 2}, True, True),
            ({}, True, False),
            ({}, True, True),
            ({}, False, True),
        )
    ]
    spec = {"folder": str(tmp_path), "cases": cases, "results": str(tmp_path / "results.json")}
    (tmp_path / "spec.json").write_text(json.dumps(spec))
    run_ranks(2, "tests.distributed.head_gradient_worker", [str(tmp_path / "spec.json")])
    results = json.loads((tmp_path / "results.json").read_text())
    assert len(results) == len(cases)
    for result in results:
        assert result["largest"] > 0, result
        # A row's chunks are added to the buffer one by one, instead of their sum: some 500 tokens in all.
        assert result["difference"] <= reordered(500), result

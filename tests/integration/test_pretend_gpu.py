"""On a pretend GPU (tests/pretend_gpu.py): host and device are never mixed, and training equals the CPU's. Kernels are not
checked."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from mpo_megatron.config import ConvertConfig
from mpo_megatron.model.convert import convert
from tests.integration.pretend_gpu_worker import run, training
from tests.tiny import random_groups, save_groups, save_model

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the pretend GPU needs a C++ compiler"),
    pytest.mark.skipif(importlib.util.find_spec("torch.nn.attention.varlen") is None, reason="the pretend GPU needs torch 2.10"),
]

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("pretend-gpu")
    hf = save_model(made / "hf", num_hidden_layers=2, hidden_size=32)
    convert(ConvertConfig(input=str(hf), output=str(made / "model")))
    save_groups(made / "groups", random_groups(4, seed=1, tied_share=0), hf)
    return made


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "tests.pretend_gpu", "tests.integration.pretend_gpu_worker", str(folder)]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


def test_training_is_that_of_the_cpu(results: dict[str, Any], folder: Path) -> None:
    shutil.rmtree(folder / "groups" / "reference")  # of the pretend GPU
    for ours, theirs in zip(run(training(folder, "cpu")), results["fp32"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-5)  # sums in another order, float32


def test_offloaded_states_train_alike_and_resume(results: dict[str, Any]) -> None:
    assert len(results["bf16"]) == 5
    for ours, theirs in zip(results["bf16"], results["offloaded"], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-3)  # two Adams: a weight that is rounded the other way moves by 2⁻⁸


def test_mistakes_are_found(results: dict[str, Any]) -> None:
    refused = results["refused"]
    assert {name for name, error in refused.items() if error is None} == {"a number of the host", "the host's index", "copies"}
    assert results["planted"] == "MixedDevicesError"

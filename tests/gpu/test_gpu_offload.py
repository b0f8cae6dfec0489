"""On a GPU: an optimizer with states in host memory trains like one without, and resumes."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from mpo_megatron.model.precision import missing_for_transformer_engine
from tests.gpu.test_gpu_train import STEPS, run
from tests.gpu.test_gpu_train import inputs as inputs  # a fixture

pytestmark = [pytest.mark.gpu, pytest.mark.slow]


def losses(inputs: Path, output: Path, *options: str) -> list[float]:
    return [line["loss"] for line in run(inputs, output, *options) if "loss" in line]


@pytest.mark.parametrize("share", ["0.5", "1.0"])
def test_offloaded_states_train_alike_and_resume(inputs: Path, tmp_path: Path, share: str) -> None:
    missing = missing_for_transformer_engine()
    if missing:
        pytest.skip(missing)
    options = ("--optimizer.cpu_offload", share)
    whole = losses(inputs, tmp_path / "run", *options)
    assert len(whole) == STEPS
    # Two implementations of Adam, whose weights are rounded to bf16 after each step.
    assert whole == pytest.approx(losses(inputs, tmp_path / "plain"), rel=1e-2)
    shutil.rmtree(tmp_path / "run" / "checkpoints" / f"step_{STEPS:08d}")  # leaves the one after half of the steps
    assert losses(inputs, tmp_path / "run", *options)[-1] == pytest.approx(whole[-1], rel=1e-2)

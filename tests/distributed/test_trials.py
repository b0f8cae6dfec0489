"""A few of the disturbances of `python -m tools.trials`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT

KINDS = (
    *("prepare/killed", "prepare/disk full", "reference/killed", "train/killed", "train/disk full", "train/two at a time"),
    *("convert adapter/disk full", "align/two at a time"),
)


@pytest.mark.distributed
@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs cc, and Linux's preloading")
def test_disturbed_commands_end_where_undisturbed_ones_end(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.trials", "--each", "2", "--folder", str(tmp_path / "trials"), "--only", *KINDS]
    result = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    # The seed is new each time, and printed.
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-6000:]}"
    assert "16 trials (6 × disk full, 6 × killed, 4 × two at a time" in result.stdout

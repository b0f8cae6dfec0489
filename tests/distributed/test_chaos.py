"""Repeatedly killed runs end like an undisturbed run; `python tools/chaos.py --kills 100` runs more."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT
from tests.waiting import TIMEOUT

KILLS = 10


@pytest.mark.distributed
@pytest.mark.slow
def test_killed_runs_end_where_an_undisturbed_one_ends(tmp_path: Path) -> None:
    command = [sys.executable, "tools/chaos.py", "--kills", str(KILLS), "--folder", str(tmp_path / "runs")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=TIMEOUT)
    # The seed is new each time, and printed.
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-6000:]}"
    summary = result.stdout.splitlines()[-1]
    kills, others = re.match(r"(\d+) kills .* resumptions \((\d+) on another layout\)", summary).groups()  # type: ignore[union-attr]
    assert int(kills) >= KILLS
    assert int(others) > 0

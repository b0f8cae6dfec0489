"""Damaged files of every kind are never read as valid values; `python -m tools.damage --trials 3000` runs more."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.launch import ROOT
from tests.waiting import TIMEOUT

TRIALS = 200


@pytest.mark.slow
def test_no_damage_is_silent(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.damage", "--trials", str(TRIALS), "--folder", str(tmp_path / "files")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT, check=False)
    # The seed is new each time, and printed.
    assert result.returncode == 0, f"{result.stdout[-4000:]}\n{result.stderr[-6000:]}"
    trials, refused, wrong = re.search(  # type: ignore[union-attr]
        r"^(\d+) trials .*?(\d+) refused.* (\d+) wrong", result.stdout.splitlines()[-1]
    ).groups()
    assert int(trials) >= TRIALS
    assert int(refused) > TRIALS / 2
    assert int(wrong) == 0

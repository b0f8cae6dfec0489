"""A pytest plugin (`-p tests.gpu.results`): appends a line per test to the file in GPU_CHECK_TESTS as soon as its outcome is
known.

pytest's own reports are written at the end: a killed or crashed session leaves none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a line when a test passes, fails or is skipped."""
    if report.when != "call" and report.outcome == "passed":
        return
    line = {
        "test": report.nodeid,
        "outcome": report.outcome,
        "seconds": round(report.duration, 2),
        "message": None if report.outcome == "passed" else str(report.longrepr)[-1500:],
    }
    with Path(os.environ["GPU_CHECK_TESTS"]).open("a") as file:
        file.write(json.dumps(line) + "\n")

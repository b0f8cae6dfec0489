"""A pytest plugin (`-p tests.gpu.results`): each test is a line of the file in GPU_CHECK_TESTS as soon as its outcome is known.

pytest's own reports are written when all is done: a session that is killed, or dies of a kernel, leaves none.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Append a line when a test has passed, failed or been skipped."""
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

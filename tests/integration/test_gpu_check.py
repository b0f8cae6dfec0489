"""The control flow of tools/gpu_check.sh, with a stand-in for Python: each part has a time limit, and keeps its results."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.waiting import TIMEOUT

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STAND_IN = f"""#!/usr/bin/env bash
# Replaces Python: the breakdown writes and then hangs; the smoke test dies; everything else passes.
case "$*" in
  *"tests.gpu.machine --summary"*) exec {sys.executable} "$@" ;;
  *tests.gpu.machine*) echo '{{}}' >"${{@: -1}}" ;;
  *tests.gpu.smoke*) echo '[{{"piece": "a kernel", "outcome": "begun"}}]' >"${{@: -1}}"; kill -SEGV $$ ;;
  "-m pytest"*) echo '{{"test": "one", "outcome": "passed"}}' >>"$GPU_CHECK_TESTS" ;;
  *benchmarks.breakdown*) echo '{{"rows": [{{"mfu": 0.5}}]}}' >"${{OUTPUT}}/breakdown.json"; trap '' INT; exec sleep 100 ;;
  *) echo "ran $*" ;;
esac
"""


def check(folder: Path, **environment: str) -> tuple[subprocess.CompletedProcess[str], Path]:
    python = folder / "python"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    output = folder / "out"
    given = {**os.environ, "PYTHON": str(python), "OUTPUT": str(output), **environment}
    return subprocess.run([SCRIPT, output], env=given, capture_output=True, text=True, timeout=TIMEOUT, check=False), output


def parts(output: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text()) for path in (output / "parts").glob("*.json")}


def test_each_part_leaves_its_file_whatever_becomes_of_the_others(tmp_path: Path) -> None:
    done, output = check(tmp_path, PARTS="machine smoke exactness layouts fp8 plan tests")
    assert done.returncode == 1, done.stdout + done.stderr
    found = parts(output)
    assert {name: part["exit_code"] != 0 for name, part in found.items()} == {
        **dict.fromkeys(("machine", "exactness", "layouts", "fp8", "plan", "tests"), False),
        "smoke": True,
    }
    summary = json.loads((output / "summary.json").read_text())
    assert [part["part"] for part in summary["parts"]] == ["machine", "smoke", "exactness", "layouts", "fp8", "plan", "tests"]
    assert summary["smoke"] == {"a kernel": "begun"}  # this one killed the process
    assert summary["tests"] == {"passed": 2}
    log = (output / "check.log").read_text()
    assert "ran -m benchmarks.fp8 --size 3b --repeat 1 --output" in log
    assert "ran -m benchmarks.plan --size 3b" in log


def test_a_part_that_hangs_is_ended_and_the_rest_gets_what_is_left(tmp_path: Path) -> None:
    done, output = check(tmp_path, PARTS="exactness breakdown plan", CHECK_SECONDS="3")
    assert done.returncode == 1
    found = parts(output)
    assert found["breakdown"]["exit_code"] == 137  # ignored the interrupt, and was killed
    assert found["breakdown"]["limit"] <= 3
    assert found["plan"]["exit_code"] == 124
    assert found["plan"]["limit"] <= 0
    summary = json.loads((output / "summary.json").read_text())
    assert summary["figures"] == {"breakdown": [{"mfu": 0.5}]}


def test_an_unknown_part_is_refused(tmp_path: Path) -> None:
    done, _ = check(tmp_path, PARTS="smoke benchmarks")
    assert done.returncode == 2
    assert "PARTS has benchmarks; there is no such part" in done.stderr


def test_all_parts_fit_into_the_time() -> None:
    text = SCRIPT.read_text()
    limits = [int(seconds) for seconds in re.findall(r"(?:part|tests|benchmark) \w+ (\d+) ", text)]
    assert len(limits) == 8
    given = re.search(r"CHECK_SECONDS:-(\d+)", text)
    assert given is not None
    assert sum(limits) <= int(given[1]) <= 580  # of 10 minutes, minus the last part's grace period and the summary


@pytest.mark.parametrize("outcome", ["passed", "failed"])
def test_outcomes_of_tests_are_written_at_once(outcome: str, tmp_path: Path) -> None:
    test = tmp_path / "test_one.py"
    test.write_text(
        "import os, pathlib\n"
        f"def test_first(): assert {outcome == 'passed'}\n"
        "def test_second():\n"
        "    assert pathlib.Path(os.environ['GPU_CHECK_TESTS']).read_text().count('\\n') == 1\n"
        "    os._exit(9)\n"
    )
    command = [sys.executable, "-m", "pytest", "-p", "tests.gpu.results", "-p", "no:cacheprovider", "-q", str(test)]
    environment = {**os.environ, "GPU_CHECK_TESTS": str(tmp_path / "found.jsonl")}
    done = subprocess.run([*command, f"--rootdir={tmp_path}"], cwd=ROOT, env=environment, capture_output=True, check=False)
    assert done.returncode == 9
    [line] = (tmp_path / "found.jsonl").read_text().splitlines()
    assert json.loads(line)["outcome"] == outcome

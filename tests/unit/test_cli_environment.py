"""Environment variables that `mpo` sets before torch is imported."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mpo_megatron import cli
from tests.waiting import TIMEOUT


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, str(cli.SPINS)), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_waiting_threads_sleep_soon_unless_the_user_says_otherwise(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    program = (
        "import os, sys\nfrom mpo_megatron.cli import main\nassert 'torch' not in sys.modules\nmain(['--version'])\n"
        "print(os.environ.get('GOMP_SPINCOUNT'))"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=TIMEOUT)
    assert result.stdout.splitlines()[-1] == str(expected)

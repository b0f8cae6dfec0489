"""Start a module of the tests on several gloo ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run_ranks(num_ranks: int, module: str, arguments: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` under torchrun on `num_ranks` ranks of this machine, on a port of its own."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m", module]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*command, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    if check and result.returncode:
        raise AssertionError(f"{module} failed with code {result.returncode}:\n{result.stdout[-4000:]}\n{result.stderr[-8000:]}")
    return result

"""This machine's ranks: how many, and starting a module on them through torchrun."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

import torch

from mpo_megatron.config import ParallelConfig

PR_SET_PDEATHSIG = 1
"""Linux prctl: the signal this process gets when its parent ends."""


def count_ranks(parallel: ParallelConfig, wanted: int | None) -> int:
    """Ranks to start: as many as wanted, or one per GPU, or what the layout needs."""
    return wanted or max(torch.cuda.device_count(), parallel.tensor * parallel.pipeline * parallel.context)


def start_ranks(module: str, arguments: Sequence[str], num_ranks: int) -> int:
    """Run `python -m module` on `num_ranks` ranks and wait; the exit status. If this process is killed, they end, too."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}", "-m", module]
    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    end_with_parent = _bind_to_parent if sys.platform == "linux" else None
    return subprocess.run([*command, *arguments], env=environment, check=False, preexec_fn=end_with_parent).returncode


def _bind_to_parent() -> None:
    # Or a killed `mpo` would leave ranks behind that write to the same run as its successor's.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

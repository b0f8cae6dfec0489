"""`mpo train` around torchrun: signals for the ranks, restarts, and the exit code, which torchrun does not pass on."""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import psutil
import torch

from mpo_megatron.config import ParallelConfig
from mpo_megatron.train.__main__ import EXIT_FILE
from mpo_megatron.train.signals import SIGNALS

STARTED = "MPO_STARTED"
"""Environment variable with the time of the start, which a run's wall time counts from, whatever restarts its ranks."""

PR_SET_PDEATHSIG = 1
"""Linux prctl: the signal that a process gets when its parent ends."""

REPEAT_SECONDS = 5.0
"""A request to stop is sent again after this time, as ranks that are just starting may not hear it yet."""


def count_ranks(parallel: ParallelConfig) -> int:
    """Ranks to start on this machine where no number is given: one per GPU, or what the layout needs."""
    return max(torch.cuda.device_count(), parallel.tensor * parallel.pipeline * parallel.context)


def launch(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
    """Start ranks of a module on this machine through torchrun and wait for them; the exit code.

    SIGTERM and SIGUSR1 are not for torchrun, which would give the ranks 30 seconds: the ranks get them, as SIGUSR1, and stop when
    their step is done and saved.

    Args:
        max_restarts: how often all ranks are started again when one fails
    """
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_ranks}"),
        *(f"--max-restarts={max_restarts}", "-m", module, *arguments),
    ]
    with tempfile.TemporaryDirectory() as folder, _requests() as requests:
        exit_file = Path(folder) / "exit_code"
        environment = {**os.environ, EXIT_FILE: str(exit_file), STARTED: str(time.time())}
        # Ranks that are started again would find addresses of those before them in a shared store (PyTorch issue 135712).
        environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
        # A session of its own: signals to this process's group (a terminal's, Slurm's) reach torchrun only through this process.
        process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=_prepare_child)
        try:
            _wait(process, requests)
        except BaseException:  # Ctrl-C: torchrun ends its ranks when it is ended
            process.terminate()
            process.wait()
            raise
        code = int(exit_file.read_text()) if exit_file.is_file() else 0
    return code or process.returncode


def _wait(process: subprocess.Popen[bytes], requests: Sequence[int]) -> None:
    """Wait for torchrun to end; as long as there is a request to stop, pass it on to the ranks."""
    sent = 0.0
    while process.poll() is None:
        if requests and time.monotonic() - sent > REPEAT_SECONDS:
            sent = time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):
                for rank in psutil.Process(process.pid).children():
                    rank.send_signal(signal.SIGUSR1)
        time.sleep(0.1)


def _prepare_child() -> None:
    """torchrun and ranks that are starting do not end of a request to stop: ranks hear it when they listen."""
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    end_with_parent()


def end_with_parent() -> None:
    """In a new process: do not outlive the one that started it; the next start would find this one at work in the same folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


@contextlib.contextmanager
def _requests() -> Iterator[list[int]]:
    """Note requests to stop instead of ending."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda number, _: received.append(number)) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

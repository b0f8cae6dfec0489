"""Start a module on several gloo ranks, as torchrun would, but without import time.

Ranks are forked from a process that has imported torch, Megatron-Core and `transformers` already, one for each process that runs
tests: importing them takes a rank six seconds of a core. What starts through torchrun, as users start it, is tested in
test_launch.py, test_restart.py and tests/integration.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing
import os
import random
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from unittest import mock

from torch.distributed import TCPStore  # type: ignore[attr-defined]  # exported, though not declared

from tests.waiting import TIMEOUT

ROOT = Path(__file__).parents[2]

PRELOADED = (
    "mpo_megatron.train.loop",
    "mpo_megatron.train.reference_main",
    "mpo_megatron.rollout.live.regularizer",
    *(f"transformers.models.{name}.modeling_{name}" for name in ("qwen2", "qwen3", "qwen2_moe", "qwen3_moe")),
)
ON_CPU = {"CUDA_VISIBLE_DEVICES": ""}
"""Environment of ranks: uses gloo, also on machines with GPUs."""
GRACE = 30.0
"""Seconds that the other ranks have to report after one has failed."""


def run_ranks(num_ranks: int, module: str, arguments: Sequence[str], *, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `python -m module` on `num_ranks` ranks of this machine; returns the first exit code that is not 0."""
    with tempfile.TemporaryDirectory() as folder:
        outputs = [Path(folder) / name for name in ("stdout", "stderr")]
        with start_ranks(num_ranks, module, arguments, outputs) as processes:
            code = _wait(processes)
        stdout, stderr = (path.read_text(errors="replace") if path.exists() else "" for path in outputs)
    if check and code:
        raise AssertionError(f"{module} failed with code {code}:\n{stdout[-4000:]}\n{stderr[-8000:]}")
    return subprocess.CompletedProcess([module, *arguments], code, stdout, stderr)


@contextlib.contextmanager
def start_ranks(num_ranks: int, module: str, arguments: Sequence[str], outputs: list[Path]) -> Iterator[list[BaseProcess]]:
    """Start `python -m module` on `num_ranks` ranks of this machine, on a separate port; kill them at the end if still running.

    Args:
        outputs: files for stdout and stderr
    """
    store = TCPStore(
        "127.0.0.1", 0, is_master=True, wait_for_workers=False
    )  # as in torchrun: a free port may be taken before use
    environment = {**os.environ, **ON_CPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port)}
    environment |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"}
    environment |= {"WORLD_SIZE": str(num_ranks), "LOCAL_WORLD_SIZE": str(num_ranks)}
    processes: list[BaseProcess] = []
    try:
        for rank in range(num_ranks):
            own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process: BaseProcess = _fork_server().Process(target=_be_rank, args=(own, Path.cwd(), outputs, module, arguments))
            process.start()
            processes.append(process)
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def launch_ranks(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
    """Replaces `mpo_megatron.train.launcher.launch`."""
    return run_ranks(num_ranks, module, arguments).returncode


def kill_ranks_when(done: Callable[[], bool], num_ranks: int, module: str, arguments: Sequence[str], log: Path) -> None:
    """Start ranks, and SIGKILL all of them as soon as `done()`; fails if they end before."""
    deadline = time.monotonic() + TIMEOUT
    with start_ranks(num_ranks, module, arguments, [log, log]) as processes:
        while not done():
            assert all(process.is_alive() for process in processes), log.read_text(errors="replace")[-8000:]
            assert time.monotonic() < deadline
            time.sleep(0.005)


def free_port() -> int:
    """A port without a listener, outside the range for outgoing connections, so that none takes it."""
    while True:
        port = random.randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.socket() as server:
            server.bind(("127.0.0.1", port))
            return port


@functools.cache
def _fork_server() -> ForkServerContext:
    """The process from which ranks are forked; it computes nothing, so that forking is safe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(os.environ, {**ON_CPU, "PYTHONPATH": str(ROOT)}):
        forkserver.ensure_running()
    return context


def _be_rank(environment: dict[str, str], folder: Path, outputs: list[Path], module: str, arguments: Sequence[str]) -> None:
    """In a forked process: run as a rank in this working folder, with its streams in files."""
    for descriptor, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    gc.freeze()  # imported objects are not garbage, and Megatron collects in every save
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv[1:] = arguments
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _wait(processes: Sequence[BaseProcess]) -> int:
    """Wait until all ranks end; after one fails, the others have a moment. Returns the first failed rank's exit code, or 0."""
    code, deadline, running = 0, time.monotonic() + TIMEOUT, list(processes)
    while running and wait([process.sentinel for process in running], max(0.0, deadline - time.monotonic())):
        for process in [process for process in running if process.exitcode is not None]:
            running.remove(process)
            if process.exitcode and not code:
                code, deadline = process.exitcode, time.monotonic() + GRACE
    for process in running:
        process.kill()
        process.join()
    return code or (-signal.SIGKILL if running else 0)

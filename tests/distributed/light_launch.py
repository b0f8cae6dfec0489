"""`launch` of light ranks in a separate process: its exit code, output, and remaining processes."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.foreground import obey_signals
from tests.waiting import TIMEOUT

ROOT = Path(__file__).parents[2]


def be_launcher(folder: Path, phase: str, num_ranks: int, max_restarts: int) -> None:
    """In a forked process: launch light ranks, and exit with their exit code."""
    code = 1
    obey_signals()
    try:
        output = os.open(folder / "output", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for descriptor in (1, 2):
            os.dup2(output, descriptor)
        os.environ["PYTHONPATH"] = str(ROOT)
        from mpo_megatron.train.launcher import launch

        arguments = [str(folder), phase]
        code = launch("tests.distributed.light_rank", arguments, num_ranks=num_ranks, max_restarts=max_restarts)
    finally:
        os._exit(code)


class Launch:
    """A launcher and its light ranks."""

    def __init__(self, process: psutil.Process, folder: Path) -> None:
        self.process, self.folder = process, folder

    def ranks(self, number: int, seconds: float = TIMEOUT) -> list[psutil.Process]:
        """The ranks, once all are running."""
        deadline = time.monotonic() + seconds
        while True:
            found = sorted(self.folder.glob("started-*"))
            with contextlib.suppress(ValueError, psutil.NoSuchProcess):  # not yet written
                if len(found) == number:
                    return [psutil.Process(int(path.read_text())) for path in found]
            if time.monotonic() > deadline:
                raise TimeoutError(self.output())
            time.sleep(0.02)

    def output(self) -> str:
        """Output of launcher and ranks."""
        path = self.folder / "output"
        return path.read_text() if path.exists() else ""


def left_over(processes: list[psutil.Process], seconds: float) -> list[psutil.Process]:
    """Processes that are still alive after a while."""
    deadline = time.monotonic() + seconds
    while (alive := [process for process in processes if _is_alive(process)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return alive


def _is_alive(process: psutil.Process) -> bool:
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


@contextlib.contextmanager
def ended(processes: list[psutil.Process]) -> Iterator[None]:
    """Assert that none of these processes is left at the end."""
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)

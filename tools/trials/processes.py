"""Commands in forked processes, disturbed at a file operation."""

from __future__ import annotations

import ctypes
import enum
import os
import resource
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

SECONDS = 300.0
"""A command that takes longer hangs."""


class Disturbance(enum.IntEnum):
    """What happens at a file operation; the numbers are failing_writes.c's."""

    NOTHING = 0
    FULL = 1
    KILL = 2
    STOP = 3


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int
    """Exit code; negative: the signal."""
    output: str
    operations: int
    """File operations below the folder."""
    writes: int
    """Those of them that need space."""


class Child:
    """A command in a forked process."""

    def __init__(
        self,
        command: Callable[[], int],
        folder: Path,
        *,
        disturbance: Disturbance = Disturbance.NOTHING,
        at: int = 0,
        open_files: int | None = None,
    ) -> None:
        """Start it.

        Args:
            folder: file operations below it count
            at: the number of the operation, from 1
        """
        self.log, self.counts = folder.parent / f"{folder.name}.log", folder.parent / f"{folder.name}.counts"
        self.counts.unlink(missing_ok=True)
        self.log.unlink(missing_ok=True)
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._be(command, folder, disturbance, at, open_files)

    def _be(self, command: Callable[[], int], folder: Path, disturbance: Disturbance, at: int, open_files: int | None) -> None:
        code = 1
        try:
            descriptor = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            if open_files is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
            library = ctypes.CDLL(os.environ["MPO_TRIALS_LIBRARY"])
            library.trial_set(f"{folder}/".encode(), ctypes.c_int(disturbance), ctypes.c_long(at))
            try:
                code = command()
            except SystemExit as leaving:
                code = leaving.code if isinstance(leaving.code, int) else int(leaving.code is not None)
            except BaseException:  # noqa: BLE001  # printed as Python itself would
                traceback.print_exc()
            counts = library.trial_operations(), library.trial_writes()
            self.counts.write_text(" ".join(map(str, counts)))
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def wait_stopped(self) -> bool:
        """Wait until it is stopped; False if it has ended instead."""
        _, status = os.waitpid(self.pid, os.WUNTRACED)
        self.status = status
        return os.WIFSTOPPED(status)

    def go_on(self) -> None:
        """Let a stopped one continue."""
        os.kill(self.pid, signal.SIGCONT)

    def outcome(self, *, ended: bool = False) -> Outcome:
        """Wait for its end; a hanging one is killed.

        Args:
            ended: `wait_stopped` has seen its end
        """
        deadline = time.monotonic() + SECONDS
        status = self.status if ended else 0
        while not ended:
            done, status = os.waitpid(self.pid, os.WNOHANG)
            ended = bool(done)
            if not ended:
                if time.monotonic() > deadline:
                    os.kill(self.pid, signal.SIGKILL)
                time.sleep(0.005)
        counts = self.counts.read_text().split() if self.counts.exists() else ["0", "0"]
        output = self.log.read_text(errors="replace") if self.log.exists() else ""
        return Outcome(os.waitstatus_to_exitcode(status), output, *map(int, counts))

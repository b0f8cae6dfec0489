"""Run functions of unknown duration, such as templates and regular expressions, in a process with limits.

Neither a thread nor a signal handler can end `10 ** 10 ** 9`, which runs in C and never returns to Python. So the function runs
in a forked process with CPU time and memory limits; the process serves further calls until one breaks a limit.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import multiprocessing
import os
import resource
import signal
import threading
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

MEMORY = 512 * 2**20
"""Memory limit of a call, in bytes."""

CHARACTERS = 2**24
"""Maximum characters of a result, as JSON."""

_WALL_FACTOR = 60
"""Wall-clock limit of a call, as a multiple of its CPU limit; only a stopped machine makes a function wait that long."""


class LimitError(Exception):
    """A call exceeded its time, memory or result size."""


class FailedError(Exception):
    """A call raised an exception, whose type and message this holds."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(f"{kind}: {message}" if message else kind)
        self.kind, self.message = kind, message


class Bounded:
    """A function that runs in a separate process with limits on CPU time, memory and result size."""

    def __init__(self, function: Callable[..., Any], cpu_seconds: float) -> None:
        """Store the function; the process starts with the first call.

        Args:
            function: takes picklable arguments, returns JSON values; an exception does not end the process
            cpu_seconds: CPU time limit of one call
        """
        self.function, self.cpu_seconds = function, cpu_seconds
        self._lock = threading.Lock()
        self._owner = 0
        self._process: BaseProcess | None = None
        self._connection: Connection | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.function, self.cpu_seconds)

    def __call__(self, *arguments: Any) -> Any:
        """The function's result.

        Raises:
            LimitError: the call broke a limit; the next call starts a new process.
            FailedError: the function raised.
        """
        with self._lock:
            if self._process is None or self._owner != os.getpid():
                self._start()
            assert self._connection is not None
            self._connection.send(arguments)
            answer = self._receive()
        result = json.loads(answer)
        if "error" in result:
            raise FailedError(*result["error"])
        if "limit" in result:
            raise LimitError(result["limit"])
        return result["value"]

    def close(self) -> None:
        """End the process; a later call starts a new one."""
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.join()
            process.close()
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at interpreter shutdown, modules may be gone
            self.close()

    def _start(self) -> None:
        self._process = None  # never end a process started by another one
        if self._connection is not None:
            self._connection.close()
        context = multiprocessing.get_context("fork")
        self._connection, theirs = context.Pipe()
        process = context.Process(target=self._serve, args=(theirs, os.getpid()), daemon=True, name="bounded")
        with warnings.catch_warnings():
            # The forked process lacks the parent's threads, and uses nothing that they may have locked.
            warnings.simplefilter("ignore", DeprecationWarning)
            process.start()
        theirs.close()
        self._process, self._owner = process, os.getpid()

    def _receive(self) -> bytes:
        assert self._connection is not None
        assert self._process is not None
        try:
            if self._connection.poll(self.cpu_seconds * _WALL_FACTOR):
                return self._connection.recv_bytes()
            reason = f"it did not end in {self.cpu_seconds * _WALL_FACTOR:g} seconds"
        except (EOFError, ConnectionResetError):
            self._process.join()
            ended_by = -(self._process.exitcode or 0)
            reason = f"it ended its process ({signal.Signals(ended_by).name if ended_by > 0 else f'exit code {-ended_by}'})"
            if ended_by == signal.SIGPROF:
                reason = f"it takes more than {self.cpu_seconds:g} seconds of CPU time"
        self.close()
        raise LimitError(reason)

    def _serve(self, connection: Connection, parent: int) -> None:
        """In the forked process: answer calls until the other end closes."""
        # Inherited files would outlive the parent: locks, and the other end of the connection.
        os.closerange(3, connection.fileno())
        os.closerange(connection.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        signal.set_wakeup_fd(-1)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGPROF):
            signal.signal(number, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the parent handles it
        with contextlib.suppress(AttributeError):  # only glibc has it
            ctypes.CDLL(None).malloc_trim(0)  # or what a rank's heap keeps or reserves could be used beyond the limit
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        limit = pages * resource.getpagesize() + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        try:
            while os.getppid() == parent:
                if connection.poll(5.0):  # a killed parent's end stays open if another child has a copy
                    connection.send_bytes(self._answer(connection.recv()))
        except (EOFError, OSError):
            pass
        finally:
            os._exit(0)

    def _answer(self, arguments: tuple[Any, ...]) -> bytes:
        signal.setitimer(signal.ITIMER_PROF, self.cpu_seconds)  # its signal ends the process in any state
        try:
            result: dict[str, Any] = {"value": self.function(*arguments)}
            text = json.dumps(result)
        except MemoryError:
            text = json.dumps({"limit": f"it takes more than {MEMORY / 2**20:,.0f} MiB of memory"})
        except Exception as error:  # noqa: BLE001 whatever an input makes the function raise, is reported to the caller
            text = json.dumps({"error": [type(error).__name__, str(error)[:2000]]})
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
        if len(text) > CHARACTERS:
            text = json.dumps({"limit": f"its result has more than {CHARACTERS:,} characters"})
        return text.encode("ascii")

"""One writer at a time: a lock that ends with its process, even after a crash."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import writing

WITHOUT_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)
"""Errors of file systems without locks, such as Lustre mounted without `flock`; files there are not locked."""


@contextlib.contextmanager
def hold(lock: Path, target: Path, wait_seconds: float = 0.0) -> Iterator[None]:
    """Be the only writer of `target` among processes that use the same lock file.

    Args:
        wait_seconds: maximum wait for another writer
    Raises:
        DataError: another process is writing (the message names it), or the lock file cannot be written.
    """
    with contextlib.ExitStack() as stack:
        with writing(lock.parent):
            lock.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(lock.open("a+"))
        started, told = time.monotonic(), False
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                file.seek(0)
                busy = f"{target}: another run is writing it ({file.read()})"
                if time.monotonic() - started >= wait_seconds:
                    raise DataError(f"{busy}; wait for it, stop it, or choose another output.") from error
                if not told:
                    print(f"{busy}; waiting …", file=sys.stderr, flush=True)
                    told = True
                time.sleep(0.2)
            except OSError as error:
                if error.errno not in WITHOUT_LOCKS:
                    raise
                break
        with writing(lock.parent):
            file.truncate(0)
            print(f"process {os.getpid()} on {socket.gethostname()}", end="", file=file, flush=True)
        try:
            yield
        finally:  # explicitly: a process forked meanwhile has a copy of the file, and so of the lock
            with contextlib.suppress(OSError):
                fcntl.flock(file, fcntl.LOCK_UN)

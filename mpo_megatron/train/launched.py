"""Messages between a rank and its launcher, through files. Imports nothing slow.

`mpo train` gives its ranks a folder (`MPO_LAUNCHER`):

    exit_code    exit code of the command, which torchrun does not pass on
    request      name of the signal that asks the run to stop; every rank polls it
    last_words   text to print last, when all ranks have ended
    failed       the rank that failed first: later failures may be its consequences

Ranks started by Slurm or torchrun have no such folder; Slurm jobs provide only the first file (`MPO_EXIT_FILE`).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import sys
from pathlib import Path

FOLDER = "MPO_LAUNCHER"
"""Environment variable with the folder of the files above."""

EXIT_FILE = "MPO_EXIT_FILE"
"""Environment variable with the path of the exit code file."""

RESTART_COUNT = "MPO_RESTART_COUNT"
"""Environment variable that counts how often `mpo train` has restarted its ranks."""

EXIT_CODE, REQUEST, LAST_WORDS, FAILED = "exit_code", "request", "last_words", "failed"

PR_SET_PDEATHSIG = 1
"""Linux prctl: the signal that a process receives when its parent ends."""


def leave(code: int) -> int:
    """The exit code for a clean exit: not a failure, for which torchrun would restart the ranks."""
    path = os.environ.get(EXIT_FILE)
    if path is None:
        return code
    _write_once(Path(path), str(code))
    return 0


def has_left() -> bool:
    """Whether a rank of this machine has exited with its own exit code."""
    return EXIT_FILE in os.environ and os.path.exists(os.environ[EXIT_FILE])


def leave_failed(code: int) -> int:
    """The exit code for an error that a person must fix: a failure, so that torchrun ends the other ranks."""
    leave(code)
    return code


def read_request(folder: Path | None = None) -> signal.Signals | None:
    """The signal that asks the run to stop, or None."""
    name = read(REQUEST, folder) or ""
    return signal.Signals[name] if name in signal.Signals.__members__ else None


def write_request(number: signal.Signals, folder: Path | None = None) -> None:
    """Ask all ranks of this machine to stop."""
    write(REQUEST, number.name, folder)


def say_last(text: str) -> bool:
    """Pass the launcher a text to print after all ranks have ended (the first text wins); False without a launcher."""
    return write(LAST_WORDS, text) is not None


def is_first_to_fail() -> bool:
    """Whether this is the first rank of this machine to fail; records that it failed."""
    return write(FAILED, os.environ.get("RANK", "0")) is not False


def read(name: str, folder: Path | None = None) -> str | None:
    """The text of one of the files; None if it does not exist."""
    folder = folder or _folder()
    if folder is None:
        return None
    try:
        return (folder / name).read_text()
    except OSError:
        return None


def write(name: str, text: str, folder: Path | None = None) -> bool | None:
    """Write one of the files unless it exists; whether this call wrote it, or None without a launcher."""
    folder = folder or _folder()
    return None if folder is None else _write_once(folder / name, text)


def end_with_parent() -> None:
    """Receive SIGTERM when the parent ends, so that the next start does not find this process writing in the same folder."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _folder() -> Path | None:
    path = os.environ.get(FOLDER)
    return None if path is None else Path(path)


def _write_once(path: Path, text: str) -> bool:
    with contextlib.suppress(OSError):  # it exists, or the launcher has ended and removed its folder
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        try:
            os.write(descriptor, text.encode())
        finally:
            os.close(descriptor)
        return True
    return False

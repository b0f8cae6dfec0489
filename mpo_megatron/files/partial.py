"""Temporary files and folders beside what they become, each owned by the process that writes it.

    .<name>.partial-<random>         a file, or a folder, that is being written
    .<name>.partial-<random>.lock    beside a folder: held as long as its writer lives

The writer holds a lock on the file, or on the folder's lock file. So what killed processes left is known from what is being
written now, on whatever machine or in whatever container, where process ids repeat. Where a file system has no locks, the
files and folders that have an owner's file stay.
"""

from __future__ import annotations

import contextlib
import fcntl
import glob
import os
import secrets
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

LOCK = ".lock"


@contextlib.contextmanager
def partial_file(target: Path) -> Iterator[tuple[Path, BinaryIO]]:
    """A new file beside `target`, and its path; deleted at the end unless it was renamed. Clears leftovers of others.

    Raises:
        OSError: it cannot be written.
    """
    clear_leftovers(target)
    path, file = _create(target, "")
    with file:
        try:
            yield path, file
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def partial_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target`; deleted at the end unless it was renamed. Leftovers of others are cleared.

    Raises:
        OSError: it cannot be written.
    """
    clear_leftovers(target)
    lock, file = _create(target, LOCK)
    with file:
        folder = lock.with_name(lock.name.removesuffix(LOCK))
        try:
            file.write(f"process {os.getpid()} on {socket.gethostname()}".encode())
            file.flush()
            folder.mkdir()
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            lock.unlink(missing_ok=True)  # last: a folder without it belongs to nobody


def clear_leftovers(target: Path) -> None:
    """Delete what killed processes left of `target`; keep what a live one is writing."""
    for path in _partials(target):
        if path.is_dir():
            if not path.with_name(path.name + LOCK).exists():
                shutil.rmtree(path, ignore_errors=True)
        else:
            _clear(path)


def find_writer(target: Path) -> str | None:
    """Which process is writing the folder `target` now, if any is."""
    for path in _partials(target):
        if path.name.endswith(LOCK):
            with contextlib.suppress(OSError), path.open("rb") as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    return file.read().decode(errors="replace")
    return None


def _partials(target: Path) -> list[Path]:
    return sorted(target.parent.glob(f".{glob.escape(target.name)}.partial-*"))


def _clear(path: Path) -> None:
    """Delete a file, and the folder that it is the lock of, unless a live process holds it."""
    with contextlib.suppress(OSError), path.open("r+b") as file:  # it has just gone, is another user's, is held, or has no locks
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.name.endswith(LOCK):
            shutil.rmtree(path.with_name(path.name.removesuffix(LOCK)), ignore_errors=True)
        path.unlink(missing_ok=True)


def _create(target: Path, suffix: str) -> tuple[Path, BinaryIO]:
    """A new file, and a lock on it."""
    while True:
        path = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}{suffix}")
        file = path.open("xb")
        with contextlib.suppress(OSError):  # no locks there
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # somebody who was clearing up took it for a leftover before it was locked

"""Temporary files and folders beside their final location, each owned by the process that writes it.

    .<name>.partial-<random>         a file or folder being written
    .<name>.partial-<random>.lock    beside a folder: locked while its writer lives

The writer locks the file, or the folder's lock file. This distinguishes leftovers of killed processes from files being written,
on any machine and in any container, where process ids repeat. On file systems without locks, files and folders with an owner's
file are kept.
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
    """A new file beside `target`, and its path; deleted at the end unless renamed. Removes others' leftovers.

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
    """A new folder beside `target`; deleted at the end unless renamed. Removes others' leftovers.

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
            lock.unlink(missing_ok=True)  # last: a folder without lock file has no owner


def clear_leftovers(target: Path) -> None:
    """Delete what killed processes left of `target`; keep what a live process is writing."""
    for path in _partials(target):
        if path.is_dir():
            if not path.with_name(path.name + LOCK).exists():
                shutil.rmtree(path, ignore_errors=True)
        else:
            _clear(path)


def find_writer(target: Path) -> str | None:
    """A description of the process that is writing the folder `target`; None if none is."""
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
    """Delete a file, and the folder that it locks, unless a live process holds the lock."""
    with contextlib.suppress(OSError), path.open("r+b") as file:  # just deleted, another user's, locked, or no locks here
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if path.name.endswith(LOCK):
            shutil.rmtree(path.with_name(path.name.removesuffix(LOCK)), ignore_errors=True)
        path.unlink(missing_ok=True)


def _create(target: Path, suffix: str) -> tuple[Path, BinaryIO]:
    """A new locked file."""
    while True:
        path = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}{suffix}")
        file = path.open("xb")
        with contextlib.suppress(OSError):  # no locks on this file system
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.fstat(file.fileno()).st_nlink:
            return path, file
        file.close()  # another process removed it as a leftover before it was locked

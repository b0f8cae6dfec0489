"""Files and folders that appear complete or not at all, and clear errors for failed writes."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import final

from mpo_megatron.files import DataError
from mpo_megatron.files.partial import find_writer, partial_file, partial_folder


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn a failed write (disk full, no permission) into a `DataError` that names the folder."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{folder}: cannot write: {error.strerror or error}; no partial output remains; free space, or choose another output."
        ) from error


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file that appears complete or not at all, and is on disk on return; until then the old file stays.

    Raises:
        DataError: it cannot be written.
    """
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial_file(path) as (partial, file):
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
            os.replace(partial, path)


def sync(path: Path) -> None:
    """Flush a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_free(folder: Path) -> bool:
    """Whether a folder can be written here: nothing exists, or an empty folder does."""
    if not folder.exists():
        return True
    return folder.is_dir() and not any(folder.iterdir())


@final
class AtomicFolder:
    """A folder that gets its name only when complete.

    Files are written to `self.path`, a hidden sibling; `commit` flushes them to disk and renames it. Leaving the `with` block
    without a commit removes the sibling. A killed process leaves it behind; the next writer of the folder removes it.
    """

    def __init__(self, target: Path) -> None:
        self.target = target
        if not is_free(target):
            raise DataError(f"{target}: exists and is not an empty folder; remove it, or choose another output.")
        self.final = target.resolve()  # follow links: the target may be on another disk
        if self.final.is_mount():
            raise DataError(f"{target}: it is a mount point; name a folder in it.")
        require_no_writer(self.final)
        with writing(target):
            self.final.parent.mkdir(parents=True, exist_ok=True)
            self._partial = partial_folder(self.final)
            self.path = self._partial.__enter__()

    def commit(self) -> None:
        """Flush everything to disk, then rename the folder to its final name."""
        with writing(self.target):
            for path in [*sorted(self.path.rglob("*")), self.path]:
                sync(path)
            appear(self.path, self.final)

    def __enter__(self) -> AtomicFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._partial.__exit__(None, None, None)


def appear(partial: Path, final: Path) -> None:
    """Rename a complete folder to its final name, where nothing or an empty folder may exist.

    Raises:
        DataError: another process created it first.
        OSError: the rename failed.
    """
    try:
        os.rename(partial, final)  # atomic; replaces an empty folder
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        raise DataError(
            f"{final}: another run has written it in the meantime; it stays unchanged. Choose another output."
        ) from error
    sync(final.parent)


def require_no_writer(target: Path) -> None:
    """Refuse a folder that another process is writing.

    Raises:
        DataError: names the process.
    """
    if writer := find_writer(target):
        raise DataError(f"{target}: another run is writing it ({writer}); wait for it, stop it, or choose another output.")

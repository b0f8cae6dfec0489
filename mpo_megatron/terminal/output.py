"""Output without a reader, as after `mpo train | head`, must not end training."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""Errors of writing after the reader closed the pipe, or the terminal is gone."""


def outlive_readers() -> None:
    """From now on, drop output to a pipe or terminal that has been closed."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO) -> TextIO:
    """The same stream, without errors when its reader has gone."""
    try:
        stream.flush()
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # not a file: in a test or a notebook
        return stream
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Lasting):
        return stream
    buffer = io.BufferedWriter(_Lasting(descriptor))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


class _Lasting(io.RawIOBase):
    """A file descriptor that switches to the null device when its reader has gone."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def writable(self) -> bool:
        """Always True, as for a real stream."""
        return True

    def isatty(self) -> bool:
        """Whether this is a terminal, for progress bars."""
        return os.isatty(self.descriptor)

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop; the number of accepted bytes."""
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.descriptor)
            os.close(null)
            return os.write(self.descriptor, data)

"""Output that nobody reads any more, as after `mpo train | head`, ends no training."""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

GONE = (errno.EPIPE, errno.EIO, errno.ENXIO)
"""What writing ends with when the reader has closed the pipe, or the terminal is gone."""


def outlive_readers() -> None:
    """From now on, what is printed to a pipe or a terminal that has been closed is dropped."""
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)


def _lasting(stream: TextIO) -> TextIO:
    """The same output, without errors when its reader has gone."""
    try:
        stream.flush()
        descriptor = stream.fileno()
    except (OSError, ValueError, AttributeError):  # no file: a test's, a notebook's
        return stream
    if isinstance(getattr(getattr(stream, "buffer", None), "raw", None), _Lasting):
        return stream
    buffer = io.BufferedWriter(_Lasting(descriptor))
    return io.TextIOWrapper(buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=True)


class _Lasting(io.RawIOBase):
    """A file descriptor that is replaced by the null device when its reader has gone."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def writable(self) -> bool:
        """True."""
        return True

    def isatty(self) -> bool:
        """Whether this is a terminal: progress bars ask."""
        return os.isatty(self.descriptor)

    def fileno(self) -> int:
        """The descriptor."""
        return self.descriptor

    def write(self, data: ReadableBuffer, /) -> int:
        """Write, or drop; the number of bytes that were taken."""
        try:
            return os.write(self.descriptor, data)
        except OSError as error:
            if error.errno not in GONE:
                raise
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self.descriptor)
            os.close(null)
            return os.write(self.descriptor, data)

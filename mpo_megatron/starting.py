"""Fewer garbage collections at the start and end of a process: imported modules hold no garbage."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def imports() -> Iterator[None]:
    """Pause garbage collection; imports then take a sixth less time."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


def before_exit() -> None:
    """Exclude live objects from Python's final collections, which take over a second with torch and Megatron-Core loaded."""
    gc.freeze()

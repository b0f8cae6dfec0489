"""Signals as commands in a terminal have them: tests under nohup or in a shell's background inherit that two are ignored."""

from __future__ import annotations

import signal


def obey_signals() -> None:
    """From now on this process, and what it starts, obeys SIGINT and SIGHUP; the product leaves ignored ones ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

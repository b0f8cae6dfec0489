"""Signals as in a terminal: tests under nohup or in a shell's background inherit that two signals are ignored."""

from __future__ import annotations

import signal


def obey_signals() -> None:
    """From now on this process and its children obey SIGINT and SIGHUP; the product keeps ignored signals ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)

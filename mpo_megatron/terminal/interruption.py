"""Requests to stop a command that runs in one process: context managers clean up, then it exits with a code and a message."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)

REQUEUE_CODE = 75
"""Exit code of a command that was asked to stop; the same command resumes it."""


ASKED_TO_STOP = (REQUEUE_CODE, 128 + signal.SIGINT)
"""Exit codes of stages that have saved and can resume."""


class StageError(RuntimeError):
    """A stage ended early, with an error that it printed or because it was asked to stop; its completed work stays."""

    def __init__(self, stage: str, status: int) -> None:
        if status in ASKED_TO_STOP:
            text = f"{stage} was asked to stop; completed work is kept: run the same command again to resume."
        else:
            text = (
                f"{stage} ended with exit status {status}; completed work is kept: fix the error above, then run "
                "the same command again."
            )
        super().__init__(text)
        self.status = status


class Interrupted(KeyboardInterrupt):
    """A request to stop arrived; not an Exception, so that no handler treats it as an ordinary failure."""

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.number = number


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Within this context, a request to stop raises `Interrupted` in the main thread, once."""
    process = os.getpid()

    def interrupt(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a forked worker: default behaviour
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        for other in SIGNALS:  # a second signal must not interrupt the cleanup
            signal.signal(other, signal.SIG_IGN)
        raise Interrupted(signal.Signals(number))

    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number, handler in before.items():
        if handler is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, interrupt)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def say_interrupted(name: str, error: KeyboardInterrupt) -> int:
    """Print on stderr that a command was interrupted, and what to do; its exit code."""
    number = error.number if isinstance(error, Interrupted) else signal.SIGINT
    print(
        f"mpo {name}: stopped ({number.name}); completed work is kept: run the same command again to resume.",
        file=sys.stderr,
        flush=True,
    )
    return REQUEUE_CODE if isinstance(error, Interrupted) else 128 + signal.SIGINT

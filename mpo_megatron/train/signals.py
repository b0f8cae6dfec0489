"""Requests to stop, heard from a rank's first moment on. Imports nothing heavy: signals may come while torch is still loading.

SIGTERM and SIGUSR1 ask a run to finish its step, save and leave. Python runs handlers between two of its own instructions
in the main thread, which may sit in a collective for minutes; so the handlers do nothing, and a thread reads the signals' numbers
from the pipe that the interpreter writes them to at once.

torchrun, too, sends SIGTERM: to the ranks that are left when one has failed. These can finish no step. They are told by the rank
that is missing beside them, and leave at once, instead of waiting for it until they are killed.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

_received: list[signal.Signals] = []


def listen() -> None:
    """From now on, requests to stop are noted instead of ending this process. Call it in the main thread, once."""
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _received.clear()
    # The thread holds both ends: a closed one would end it.
    threading.Thread(target=_read, args=(reader, writer), name="signals", daemon=True).start()


def requested() -> signal.Signals | None:
    """The first request to stop, or None."""
    return _received[0] if _received else None


def ignore() -> None:
    """From now on, requests to stop change nothing: the process is about to end. Python itself would go back to dying of them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _read(reader: socket.socket, writer: socket.socket) -> None:
    while True:
        for number in reader.recv(64):
            if number in SIGNALS:
                _received.append(signal.Signals(number))
                if number == signal.SIGTERM:
                    _leave_if_alone()


def _leave_if_alone() -> None:
    """End this process if torchrun has lost a rank of this machine; it looks for a moment, as the loss may be just happening."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return
    import psutil

    for _ in range(10):
        ranks = [child for child in psutil.Process(os.getppid()).children() if child.status() != psutil.STATUS_ZOMBIE]
        if len(ranks) < int(os.environ["LOCAL_WORLD_SIZE"]):
            rank = os.environ.get("RANK")
            print(f"rank {rank}: another rank has failed, and SIGTERM came; leaving", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)
        time.sleep(0.1)

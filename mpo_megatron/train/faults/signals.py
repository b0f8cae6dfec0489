"""Requests to stop, received from a rank's start. Imports nothing slow: signals may arrive while torch is loading.

SIGTERM and SIGUSR1 ask a run to save and exit. While there is nothing to save (start-up, loading of weights), a rank exits at
once on request, with the exit code that means "resume me". After `defer()`, a request is only recorded: the caller polls
`requested()` after each piece of work, agrees with the other ranks, and saves.

Python runs signal handlers between two bytecodes of the main thread, which may wait in a collective or read weights for minutes.
So the handlers do nothing, and a thread reads the signals' numbers from the pipe to which the interpreter writes them.

torchrun also sends SIGTERM: to the remaining ranks after one has failed. These can finish no step, so they exit at once when a
neighbouring rank is missing, instead of waiting to be killed.

Ranks receive each other's requests through their launcher's folder (launched.py). Ranks without one, on several machines or under
srun, would wait for a rank that has exited. So a rank that receives a request before it has joined the others joins them first,
for `JOIN_SECONDS` at most, and announces its exit through a `Channel`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Protocol

from mpo_megatron.train import launched

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)

POLL_SECONDS = 0.2
"""Seconds between checks for a request received by the launcher or another rank."""

REQUEUE_CODE = 75
"""Exit code of a rank that is asked to stop before its configuration is read (afterwards `faults.requeue_code`)."""

LOOKS = 10
"""Checks for a missing neighbour after SIGTERM, a tenth of a second apart: a neighbour may be exiting."""

JOIN_SECONDS = 25.0
"""Seconds in which a rank that was asked to stop still tries to join the others that wait for it; then it exits alone. Slurm,
Kubernetes and torchrun kill 30 seconds after SIGTERM."""

TELL_SECONDS = 1.0
"""Seconds between checks for an exiting rank; that rank stays twice as long, because the store may end with it."""

_received: list[signal.Signals] = []


class Channel(Protocol):
    """How ranks without a launcher announce their exit."""

    def tell(self, number: signal.Signals) -> None:
        """Announce that this rank exits because of a signal."""

    def told(self) -> signal.Signals | None:
        """The signal because of which another rank exits, or None."""


class _Manner:
    """How this process responds to a request."""

    program = "mpo train"
    requeue_code = REQUEUE_CODE
    deferrals = 0
    ignores = False
    must_join = False
    """Whether the other ranks would wait for this one if it exited."""
    channel: Channel | None = None
    others_leave = False
    """Whether another rank has exited on request."""
    asked_at: float | None = None
    """Time of this rank's own request, on the monotonic clock."""


def listen(program: str = "mpo train") -> None:
    """From now on, a request to stop ends this process cleanly. Call it once, in the main thread.

    Args:
        program: name in printed messages
    """
    reader, writer = socket.socketpair()
    reader.settimeout(POLL_SECONDS)
    writer.setblocking(False)
    for number in SIGNALS:
        signal.signal(number, lambda *_: None)
    signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    _received.clear()
    _Manner.program, _Manner.requeue_code, _Manner.deferrals, _Manner.ignores = program, REQUEUE_CODE, 0, False
    _Manner.must_join, _Manner.channel, _Manner.others_leave, _Manner.asked_at = is_on_its_own(), None, False, None
    parent = os.getppid()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        launched.end_with_parent()
    # The thread holds both ends: closing one would end it.
    threading.Thread(target=_read, args=(reader, writer, parent), name="signals", daemon=True).start()


def is_on_its_own() -> bool:
    """Whether nothing informs the other ranks of this rank's exit: no `mpo train`, and no single torchrun for all ranks."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    under_one_agent = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("LOCAL_WORLD_SIZE", "1")) == ranks
    return ranks > 1 and launched.FOLDER not in os.environ and not under_one_agent


def join(channel: Channel) -> None:
    """From now on, announce this rank's exit through a channel, unless something else does."""
    if _Manner.must_join:
        _Manner.channel, _Manner.must_join = channel, False
        leave_if_asked()


def part() -> None:
    """Stop using the channel, because its store ends."""
    _Manner.channel = None


def leave_with(code: int) -> None:
    """Set the exit code for an exit on request."""
    _Manner.requeue_code = code


def defer() -> None:
    """From now on, only record requests: there is something to save, and `requested` is polled."""
    _Manner.deferrals += 1


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Within this context, behave as after `defer`; also after an exception, because the work is about to end with it."""
    defer()
    yield
    _Manner.deferrals -= 1


def requested() -> signal.Signals | None:
    """The first request to stop, or None."""
    return _received[0] if _received else None


def ignore() -> None:
    """Ignore requests to stop from now on: the process is ending. Python's default would kill it again."""
    _Manner.ignores = True
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def requeue_code() -> int:
    """The exit code for an exit on request."""
    return _Manner.requeue_code


def leave_if_others_have() -> None:
    """End this process if its work failed because other ranks have exited on request."""
    if not _received and (asked := launched.read_request()) is not None:
        _received.append(asked)
    _look_at_channel()
    if _received and launched.has_left():
        _Manner.deferrals = 0
    leave_if_asked()


def leave_if_asked() -> None:
    """End this process if a request is pending and there is nothing to save."""
    if not _received or _Manner.ignores or (_Manner.deferrals and not _Manner.others_leave):
        return
    if _Manner.must_join and _Manner.asked_at is not None and time.monotonic() < _Manner.asked_at + JOIN_SECONDS:
        return
    channel = _Manner.channel
    if channel is not None and not _Manner.others_leave:
        channel.tell(_received[0])
        time.sleep(2 * TELL_SECONDS)
    text = f"{_Manner.program}: stopped ({_received[0].name}) before there was anything new to save; run the same command again."
    if not launched.say_last(text) and os.environ.get("LOCAL_RANK", "0") == "0":
        print(text, file=sys.stderr, flush=True)
    os._exit(launched.leave(_Manner.requeue_code))


def _read(reader: socket.socket, writer: socket.socket, parent: int) -> None:
    looked = time.monotonic()
    while True:
        numbers = b""
        with contextlib.suppress(TimeoutError):
            numbers = reader.recv(64)
        for number in numbers:
            if number in SIGNALS:
                _note(signal.Signals(number), parent)
        if not _received and (asked := launched.read_request()) is not None:
            _received.append(asked)
        if time.monotonic() > looked + TELL_SECONDS:
            looked = time.monotonic()
            _look_at_channel()
        leave_if_asked()


def _look_at_channel() -> None:
    """Record that another rank exits: work that needs all ranks can no longer finish, even after `defer`."""
    channel = _Manner.channel
    told = None if channel is None or _Manner.others_leave else channel.told()
    if told is not None:
        _Manner.others_leave = True
        _received.append(told)


def _note(number: signal.Signals, parent: int) -> None:
    """Record a signal, and inform the other ranks of this machine, unless it means that one of them has failed."""
    if number == signal.SIGTERM and "TORCHELASTIC_RUN_ID" in os.environ:
        _leave_if_alone(parent)
    if _Manner.asked_at is None:
        _Manner.asked_at = time.monotonic()
    _received.append(number)
    launched.write_request(number)


def _leave_if_alone(parent: int) -> None:
    """End this process if torchrun has lost a rank of this machine; wait a moment first, because the rank may be exiting.

    If torchrun itself has ended, no rank is missing: the ranks are asked to stop.
    """
    missing = 0
    for _ in range(LOOKS):
        if os.getppid() != parent:
            return
        # Twice: an exiting process's children are briefly without a parent.
        missing = missing + 1 if _count_ranks(parent) < int(os.environ["LOCAL_WORLD_SIZE"]) else 0
        if missing == 2:
            rank = os.environ.get("RANK")
            if launched.read(launched.LAST_WORDS) is None:
                print(f"rank {rank}: another rank has failed, and SIGTERM arrived; exiting", file=sys.stderr, flush=True)
            os._exit(128 + signal.SIGTERM)
        time.sleep(0.1)


def _count_ranks(parent: int) -> int:
    """Number of live ranks on this machine: children of the same parent with the same command."""
    import psutil

    count = 0
    with contextlib.suppress(psutil.NoSuchProcess):  # the parent may end meanwhile
        command = psutil.Process().cmdline()
        for child in psutil.Process(parent).children():
            with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):  # the process has ended meanwhile
                count += child.status() != psutil.STATUS_ZOMBIE and child.cmdline() == command
    return count

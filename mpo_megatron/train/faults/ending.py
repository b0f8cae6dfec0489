"""How a rank ends: one rank reports the error, and a failed rank does not wait for others."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from mpo_megatron import starting
from mpo_megatron.terminal.visible import message as shown
from mpo_megatron.train import launched

ALONE_SECONDS = 3.0
"""Seconds after which a failed rank counts as the only failed one on its machine."""


def end(main: Callable[[], int]) -> NoReturn:
    """Do a rank's work and end this process with its exit code; immediately after a failure.

    Otherwise Python would first destroy NCCL's communicators, which waits for the other ranks of this machine. These do not know
    of the failure and hang in a collective until a time limit, with the reason still unreported.
    """
    try:
        code = main()
    except SystemExit:  # --help
        raise
    except BaseException:  # noqa: BLE001  # printed as Python itself would; not all of torch's errors are an Exception
        # Later failures, after a rank has reported its reason, are consequences.
        if launched.is_first_to_fail() or launched.read(launched.LAST_WORDS) is None:
            print(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} failed:", file=sys.stderr)
            traceback.print_exc()
        code = 1
    if code == 0:
        starting.before_exit()
        sys.exit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def complain(program: str, message: str) -> None:
    """Report an error that a person must fix: through the launcher, or once per machine if all its ranks have the same message,
    because other machines may not see it."""
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    where = "" if rank == "0" else f"rank {rank} on {socket.gethostname()}: "
    text = f"{program}: {where}{shown(message)}"
    if launched.say_last(text):
        return
    if local != "0":  # if others report the same, the launcher ends this rank now
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(ALONE_SECONDS)
    print(text, file=sys.stderr, flush=True)

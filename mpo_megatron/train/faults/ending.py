"""How a rank ends: which rank reports the error; a failed rank waits for no other."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from typing import NoReturn

from mpo_megatron.terminal.visible import visible
from mpo_megatron.train import launched

ALONE_SECONDS = 3.0
"""After this time, a failed rank is taken for the only failed one on its machine."""


def end(main: Callable[[], int]) -> NoReturn:
    """Do a rank's work and end this process with its exit code; immediately after a failure.

    Otherwise Python would first take down NCCL's communicators, which waits for the other ranks of this machine. These do not
    know of the failure and hang in a collective, until a time limit ends all, with the reason still unsaid.
    """
    try:
        code = main()
    except SystemExit:  # --help
        raise
    except BaseException:  # noqa: BLE001  # printed as Python itself would; not all of torch's errors are an Exception
        # What fails after a rank that has said why fails because of it.
        if launched.is_first_to_fail() or launched.read(launched.LAST_WORDS) is None:
            print(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} failed:", file=sys.stderr)
            traceback.print_exc()
        code = 1
    if code == 0:
        sys.exit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def complain(program: str, message: str) -> None:
    """Say what a person must fix: through the launcher, or once a machine if all its ranks say the same, as they may be the only
    ones that see it."""
    rank, local = os.environ.get("RANK", "0"), os.environ.get("LOCAL_RANK", "0")
    where = "" if rank == "0" else f"rank {rank} on {socket.gethostname()}: "
    message = visible(message, lines=True)
    if launched.say_last(f"{program}: {where}{message}"):
        return
    if local != "0":  # if others say the same, whoever started the ranks ends this one now
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(ALONE_SECONDS)
    print(f"{program}: {where}{message}", file=sys.stderr, flush=True)

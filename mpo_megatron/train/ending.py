"""How a rank ends: who says what went wrong, and that a rank which has failed waits for no other."""

from __future__ import annotations

import os
import socket
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn


def end(main: Callable[[], int]) -> NoReturn:
    """Do a rank's work and end this process with its exit code; after a failure at once.

    Otherwise Python would first take down NCCL's communicators, which waits for the other ranks of this machine. These do not
    know of the failure and hang in a collective, until a time limit ends all, with the reason still unsaid.
    """
    try:
        code = main()
    except SystemExit:  # --help
        raise
    except BaseException:  # noqa: BLE001  # printed as Python itself would; not all of torch's errors are an Exception
        print(f"rank {os.environ.get('RANK', '0')} on {socket.gethostname()} failed:", file=sys.stderr)
        traceback.print_exc()
        code = 1
    if code == 0:
        sys.exit()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def complain(program: str, error: Exception) -> None:
    """Print what a person must mend: the main rank, and one rank of every other machine, as it may be one of theirs alone."""
    rank = os.environ.get("RANK", "0")
    if rank == "0":
        print(f"{program}: {error}", file=sys.stderr, flush=True)
    elif os.environ.get("LOCAL_RANK") == "0":
        print(f"{program}: rank {rank} on {socket.gethostname()}: {error}", file=sys.stderr, flush=True)

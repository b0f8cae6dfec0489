"""The frame of every rank's program: requests to stop from the start, messages instead of tracebacks, exit codes.

Exit codes: 0, the work is complete; 2, a person must fix something, named in the message; `faults.requeue_code` (75), the rank
was asked to stop, has saved, and resumes with the same command; any other code: a failure, run it again.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from mpo_megatron.config.rendezvous import RendezvousError
from mpo_megatron.terminal.output import outlive_readers
from mpo_megatron.train import launched
from mpo_megatron.train.faults import signals
from mpo_megatron.train.faults.ending import complain, end

if TYPE_CHECKING:
    from mpo_megatron.config import TrainConfig
    from mpo_megatron.train.setup import Setup

NEEDS_A_PERSON = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""File system errors that a restart does not fix: no space, or no permission."""


def be_rank(program: str, work: Callable[[], str | None]) -> NoReturn:
    """Do a rank's work, and end this process with its exit code.

    Args:
        program: the command that the user called, for messages
        work: parses the command line and does the work; returns why it stopped early, or None
    """
    end(lambda: run(program, work))


def run(program: str, work: Callable[[], str | None]) -> int:
    """Do a rank's work, with a message instead of a traceback for errors that a user can fix. Returns the exit code."""
    signals.listen(program)  # before any slow import
    outlive_readers()
    try:
        return _run(program, work)
    finally:
        signals.ignore()


def read_setup(program: str) -> Setup:
    """The setup described by a rank's command line, as for `mpo train`.

    Raises:
        ConfigError: it cannot work.
    """
    from mpo_megatron.config import TrainConfig, parse

    return prepare_rank(parse(TrainConfig, program=program))


def prepare_rank(config: TrainConfig) -> Setup:
    """This rank's setup; also sets what holds for its whole process: environment, memory allocation, exit code.

    Raises:
        ConfigError: the configuration cannot work.
    """
    from mpo_megatron.train.environment import set_environment

    set_environment(config)  # before torch is imported, and CUDA initialized
    from mpo_megatron import device
    from mpo_megatron.train.setup import build_setup

    device.keep_freed_memory()
    signals.leave_with(config.faults.requeue_code)
    return build_setup(config, int(os.environ.get("WORLD_SIZE", "1")))  # without torchrun, the world size is 1


def _run(program: str, work: Callable[[], str | None]) -> int:
    try:
        stopped = work()
    except RendezvousError as error:  # may be temporary: a restart, but no traceback
        signals.leave_if_others_have()
        complain(program, str(error))
        return 1
    except Exception as error:
        stopped = _why_stopped(error)
        if stopped is None:
            message = _explain(error)
            if message is None:
                signals.leave_if_others_have()  # they exited first, and this rank lost its connection to them
                raise
            complain(program, message)
            return launched.leave_failed(2)
    if stopped is None:
        return 0
    if os.environ.get("RANK", "0") == "0":
        text = f"{program}: stopped ({stopped}) and saved; run the same command again to resume."
        if not launched.say_last(text):
            print(text, file=sys.stderr, flush=True)
    return launched.leave(signals.requeue_code())


def _why_stopped(error: Exception) -> str | None:
    """Why all ranks agreed to stop; None for an error."""
    stopping = sys.modules.get("mpo_megatron.train.faults.stopping")  # if it was never imported, nothing was stopped
    return str(error) if stopping is not None and isinstance(error, stopping.Stopped) else None


def _explain(error: Exception) -> str | None:
    """The message for an expected error; None for others."""
    from mpo_megatron.config import ConfigError
    from mpo_megatron.files import DataError

    if isinstance(error, ConfigError | DataError):
        return str(error)
    if isinstance(error, OSError) and error.errno in NEEDS_A_PERSON:  # on one rank; the others end as a consequence
        return f"{error.filename or 'a file'}: {error.strerror}; fix it, then run the same command again to resume."
    from mpo_megatron.data.packing import PackingError
    from mpo_megatron.train.checkpoints.step_folders import SaveError
    from mpo_megatron.train.faults.incidents import TrainingError

    return str(error) if isinstance(error, PackingError | SaveError | TrainingError) else None

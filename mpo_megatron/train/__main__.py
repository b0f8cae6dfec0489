"""`torchrun … -m mpo_megatron.train --config FILE --key value`: one rank of a training run.

Exit codes: 0 the run is complete; 2 a person must mend something, the message says what; `faults.requeue_code` (75) the run was
asked to stop, has saved, and goes on when it is started again; anything else: a failure, start it again.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import os
import sys
from typing import TYPE_CHECKING

from mpo_megatron.train import signals
from mpo_megatron.train.ending import complain, end

if TYPE_CHECKING:
    from collections.abc import Callable

    from mpo_megatron.config import TrainConfig

NEEDS_A_PERSON = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM)
"""Errors of the file system that starting again does not mend: no space, or no permission."""

EXIT_FILE = "MPO_EXIT_FILE"
"""Environment variable with the file in which `mpo train` looks for the exit code, which torchrun does not pass on."""


def main() -> int:
    """Parse the command line and train."""
    signals.listen()  # before anything heavy is imported: a request to stop may come at any time

    def train(config: TrainConfig) -> str | None:
        from mpo_megatron.train.loop import train

        gc.freeze()  # Megatron collects garbage in every save: a quarter of a second if it looks at all that was imported
        return train(config)

    return run(train)


def run(train: Callable[[TrainConfig], str | None]) -> int:
    """Parse the command line and train with the given function; a message instead of a traceback for what a user can mend.

    Args:
        train: returns why it stopped early, or None
    Returns:
        The exit code.
    """
    _forget_exit_code()
    try:
        return _run(train)
    finally:
        signals.ignore()


def _run(train: Callable[[TrainConfig], str | None]) -> int:
    from mpo_megatron.config import ConfigError, TrainConfig, parse
    from mpo_megatron.train.environment import set_environment

    try:
        config = parse(TrainConfig, program="mpo train")
        set_environment(config)  # before anything starts CUDA
        from mpo_megatron.data import DataError
        from mpo_megatron.train.incidents import TrainingError
        from mpo_megatron.train.step_folders import SaveError
    except ConfigError as error:
        return _fail(error)
    try:
        stopped = train(config)
    except (ConfigError, DataError, SaveError, TrainingError) as error:
        return _fail(error)
    except OSError as error:  # of one rank; the others end because it does
        if error.errno not in NEEDS_A_PERSON:
            raise
        message = f"output = {config.output}: {error}; mend it, and start the same command again: it resumes."
        print(f"mpo train: {message}", file=sys.stderr, flush=True)
        return _leave_failed()
    if stopped is None:
        return 0
    if _is_main():
        print(f"stopped and saved: {stopped}; the same command goes on from here", flush=True)
    return _leave(config.faults.requeue_code)


def _fail(error: Exception) -> int:
    complain("mpo train", error)
    return _leave_failed()


def _leave_failed() -> int:
    """The exit code for a rank that a person must help; to torchrun a failure, so that it ends the others."""
    _leave(2)
    return 2


def _leave(code: int) -> int:
    """The exit code for a rank that leaves in good order, which is no failure to torchrun: it would answer one with a restart."""
    path = os.environ.get(EXIT_FILE)
    if path is None:
        return code
    if os.environ.get("LOCAL_RANK", "0") == "0":
        with open(path, "w") as file:
            file.write(str(code))
    return 0


def _forget_exit_code() -> None:
    """What ranks left that failed before these were started in their place."""
    if EXIT_FILE in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(FileNotFoundError):
            os.remove(os.environ[EXIT_FILE])


def _is_main() -> bool:
    return os.environ.get("RANK", "0") == "0"


if __name__ == "__main__":
    end(main)

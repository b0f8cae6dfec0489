"""`mpo train` around torchrun's agent: requests to stop, restarts, the exit code, and the final message."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

import psutil
import torch
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from mpo_megatron.config import ParallelConfig
from mpo_megatron.train import launched
from mpo_megatron.train.faults.stopping import STARTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
"""Requests to stop; a closed terminal sends SIGHUP."""

ELASTIC_LOGGER = "torch.distributed.elastic"


def count_ranks(parallel: ParallelConfig) -> int:
    """Default number of ranks on this machine: one per GPU, or what the layout needs."""
    return max(torch.cuda.device_count(), parallel.tensor * parallel.pipeline * parallel.context)


def launch(module: str, arguments: Sequence[str], *, num_ranks: int, max_restarts: int) -> int:
    """Run ranks of a module on this machine through torchrun's agent and wait for them; the exit code.

    Requests to stop bypass the agent, which would give the ranks 30 seconds: ranks find them in a file, and stop after their step
    is done and saved.

    Args:
        max_restarts: how often to restart all ranks after an unexpected failure
    """
    environment = {STARTED: str(time.time())}
    environment["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // num_ranks)))
    for attempt in range(max_restarts + 1):
        # A new agent per attempt: restarted ranks would find their predecessors' addresses in its store.
        with tempfile.TemporaryDirectory(prefix="mpo-") as folder, _requests(Path(folder), module):
            environment |= {launched.RESTART_COUNT: str(attempt)}
            failure = _run_agent(Path(folder), module, arguments, num_ranks, environment)
            asked = launched.read_request(Path(folder))
            left = launched.read(launched.EXIT_CODE, Path(folder))
            last_words = launched.read(launched.LAST_WORDS, Path(folder))
        code = int(left) if left else int(failure is not None)
        if code and asked == signal.SIGINT:
            code = 128 + signal.SIGINT
        if failure is None or left or asked is not None:
            break
        if attempt < max_restarts:
            print(f"mpo: {failure}; restarting all ranks ({attempt + 1} of {max_restarts}).", file=sys.stderr, flush=True)
    if last_words is not None or failure is not None:
        text = last_words or f"mpo: {failure}. Run the same command again: it resumes from the newest checkpoint."
        print(text, file=sys.stderr, flush=True)
    return code


def _run_agent(folder: Path, module: str, arguments: Sequence[str], num_ranks: int, environment: dict[str, str]) -> str | None:
    """Run ranks to their end; return a message if one failed."""
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_ranks,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        signals_to_handle="SIGQUIT",  # other signals are handled here
    )
    own = {launched.FOLDER: str(folder), launched.EXIT_FILE: str(folder / launched.EXIT_CODE)}
    try:
        with _environment({**environment, **own}), _quiet_agent():
            elastic_launch(config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        return _describe(error, launched.read(launched.FAILED, folder))
    return None


def _describe(error: ChildFailedError, first: str | None) -> str:
    """Which rank failed first, and how.

    Args:
        first: the rank that printed the first traceback; a killed rank prints none
    """
    for rank, failure in error.failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:  # the agent sends it to the remaining ranks
            name = signal.Signals(-failure.exitcode).name
            return f"rank {rank} was killed by {name}" + ("; often out of memory: see dmesg" if name == "SIGKILL" else "")
    if first is not None:
        return f"rank {first} failed; its traceback is the first one above"
    rank, failure = error.get_first_failure()
    return f"rank {rank} failed with exit code {failure.exitcode}"


@contextlib.contextmanager
def _requests(folder: Path, module: str) -> Iterator[None]:
    """Pass requests to stop to the ranks instead of ending; a second Ctrl-C ends them and this process."""

    interruptions = 0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal interruptions
        interruptions += number == signal.SIGINT
        if number == signal.SIGINT and interruptions > 1:  # a second Ctrl-C overrides earlier requests
            for rank in ranks_of(module):
                rank.kill()
            raise KeyboardInterrupt
        launched.write_request(
            signal.Signals(number), folder
        )  # before the message, after which a second Ctrl-C may follow at once
        if number == signal.SIGINT:
            print("interrupted: the run saves and leaves; Ctrl-C again ends it at once.", file=sys.stderr, flush=True)

    before = {number: signal.getsignal(number) for number in (*SIGNALS, signal.SIGQUIT)}
    try:
        for number in SIGNALS:
            if before[number] is not signal.SIG_IGN:  # nohup ignores SIGHUP, shells' background jobs ignore SIGINT
                signal.signal(number, ask)
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ranks_of(module: str) -> list[psutil.Process]:
    """This process's ranks of a module."""
    ranks = []
    for child in psutil.Process().children():
        with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
            if module in child.cmdline():
                ranks.append(child)
    return ranks


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Within this context, these environment variables are set; ranks inherit them."""
    before = dict(os.environ)
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Within this context, torchrun's agent logs nothing: it would only repeat the ranks' output."""
    logger = logging.getLogger(ELASTIC_LOGGER)
    null, propagate = logging.NullHandler(), logger.propagate
    logger.addHandler(null)
    logger.propagate = False
    try:
        yield
    finally:
        logger.removeHandler(null)
        logger.propagate = propagate

"""Launched ranks that are killed or asked to stop: `mpo train`'s launcher with ranks that compute nothing (tests/distributed)."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

from mpo_megatron.train import launcher  # noqa: F401  (imported for the launchers that are forked)
from tests.distributed.light_launch import Launch, be_launcher, left_over

REQUESTS = {signal.SIGTERM: 75, signal.SIGUSR1: 75, signal.SIGHUP: 75, signal.SIGINT: 130}
"""Exit code after each signal to the launcher."""
COMES_DOWN = 60.0
"""Seconds in which everything must have ended."""
NUM_RANKS = 2


def launch_trials(folder: Path, each: int, rng: random.Random) -> Iterator[str | None]:
    """What is wrong with each trial, or None."""
    folder.mkdir(exist_ok=True)
    actions: list[signal.Signals | str] = [*REQUESTS, "kill the launcher", "kill a rank", "ask a rank"]
    for number in range(each):
        for action in actions:
            for phase in ("loading", "steps"):
                place = folder / f"launch-{number}-{actions.index(action)}-{phase}"
                place.mkdir()
                wrong = _trial(place, phase, action, rng)
                yield None if wrong is None else f"launched ranks, {phase}, {action} ({place}): {wrong}"
                if wrong is None:
                    shutil.rmtree(place)


def _trial(folder: Path, phase: str, action: signal.Signals | str, rng: random.Random) -> str | None:
    pid = os.fork()
    if pid == 0:
        be_launcher(folder, phase, NUM_RANKS, 0)
    run = Launch(psutil.Process(pid), folder)
    ranks = run.ranks(NUM_RANKS)
    time.sleep(rng.uniform(0, 0.3))
    if action == "kill the launcher":
        run.process.kill()
    elif action == "kill a rank":
        rng.choice(ranks).kill()
    elif action == "ask a rank":
        rng.choice(ranks).send_signal(signal.SIGUSR1)
    else:
        assert isinstance(action, signal.Signals)
        run.process.send_signal(action)
    code = _wait(pid)
    output, left = run.output(), left_over(ranks, COMES_DOWN)
    for rank in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            rank.kill()
    if left or code is None:
        return f"left running: {len(left)} ranks, launcher: {code is None}\n{output[-2000:]}"
    saved = len(list(folder.glob("saved-*")))
    if action == "kill a rank":
        return None if code == 1 and "was killed by SIGKILL" in output.splitlines()[-1] else f"{code}\n{output[-2000:]}"
    if saved != (NUM_RANKS if phase == "steps" else 0):
        return f"{saved} ranks saved\n{output[-2000:]}"
    if action == "kill the launcher":
        return None
    asked = action if isinstance(action, signal.Signals) else signal.SIGUSR1  # a rank passes its signal on
    expected, named = REQUESTS[asked], asked.name
    if code != expected or f"stopped ({named})" not in output.splitlines()[-1] or "Traceback" in output:
        return f"exit code {code}\n{output[-2000:]}"
    return None


def _wait(pid: int) -> int | None:
    """The exit code of a child; None if it does not end."""
    deadline = time.monotonic() + COMES_DOWN
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None

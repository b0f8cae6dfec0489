"""`launch` with ranks that compute nothing: stop requests, last output, exit codes, and no remaining processes."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from tests.distributed.launch import _fork_server
from tests.distributed.light_launch import Launch, be_launcher, ended, left_over
from tests.waiting import TIMEOUT

pytestmark = pytest.mark.distributed

Start = Callable[..., Launch]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Starts a launcher in a separate process."""
    processes: list[psutil.Process] = []

    def begin(phase: str, num_ranks: int = 2, max_restarts: int = 0) -> Launch:
        process = _fork_server().Process(target=be_launcher, args=(tmp_path, phase, num_ranks, max_restarts))
        process.start()
        processes.append(psutil.Process(process.pid))
        found = Launch(processes[0], tmp_path)
        found.handle = process  # type: ignore[attr-defined]
        return found

    with ended(processes):
        yield begin


def end(run: Launch) -> tuple[int, str]:
    """The exit code and output, after all processes have ended."""
    handle = run.handle  # type: ignore[attr-defined]
    handle.join(TIMEOUT)
    assert handle.exitcode is not None, run.output()
    assert "torch.distributed.elastic" not in run.output()
    return handle.exitcode, run.output()


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGHUP, 75), (signal.SIGINT, 130)],
)
def test_a_request_is_named_as_it_was_sent_and_everyone_saves(start: Start, number: signal.Signals, code: int) -> None:
    run = start("steps")
    ranks = run.ranks(2)
    run.process.send_signal(number)
    found, output = end(run)
    assert found == code, output
    assert output.splitlines()[-1] == f"mpo train: stopped ({number.name}) and saved; run the same command again to resume."
    assert len(list(run.folder.glob("saved-*"))) == 2
    assert not left_over(ranks, 0)


@pytest.mark.parametrize("phase", ["loading", "steps"])
def test_a_request_to_one_rank_reaches_the_others(start: Start, phase: str) -> None:
    run = start(phase)
    run.ranks(2)[1].send_signal(signal.SIGUSR1)
    code, output = end(run)
    assert code == 75, output
    assert "(SIGUSR1)" in output.splitlines()[-1]
    assert "Traceback" not in output


def test_a_request_before_there_is_anything_to_save_ends_all_at_once(start: Start) -> None:
    run = start("loading")
    run.ranks(2)
    run.process.send_signal(signal.SIGTERM)
    code, output = end(run)
    assert code == 75, output
    assert output.splitlines()[-1].startswith("mpo train: stopped (SIGTERM) before there was anything new to save")


def test_a_second_ctrl_c_ends_it_at_once(start: Start) -> None:
    run = start("broken", num_ranks=1)  # no failure: there is no rank 1
    ranks = run.ranks(1)
    ranks[0].suspend()
    run.process.send_signal(signal.SIGINT)
    while "Ctrl-C again ends it at once" not in run.output():
        pass
    run.process.send_signal(signal.SIGINT)
    code, _ = end(run)
    assert code != 0
    assert not left_over(ranks, 10)


def test_what_a_user_must_fix_is_the_last_line_and_nobody_starts_again(start: Start) -> None:
    run = start("wrong", max_restarts=2)
    code, output = end(run)
    assert code == 2, output
    assert output.splitlines()[-1].endswith("loss.name = x; there is no such loss.")
    assert output.count("there is no such loss") == 1
    assert output.count("rank 0 works") == 1
    assert "Traceback" not in output


def test_an_unexpected_failure_has_its_traceback_and_is_tried_again(start: Start) -> None:
    run = start("broken", max_restarts=1)
    code, output = end(run)
    assert code == 1, output
    assert output.count("RuntimeError: out of memory") == 2
    assert "mpo: rank 1 failed; its traceback is the first one above; restarting all ranks (1 of 1)." in output
    assert output.splitlines()[-1].startswith("mpo: rank 1 failed; its traceback is the first one above. Run the same command")


def test_a_killed_rank_is_named(start: Start) -> None:
    run = start("steps")
    ranks = run.ranks(2)
    ranks[1].kill()
    code, output = end(run)
    assert code == 1, output
    assert output.splitlines()[-1].startswith("mpo: rank 1 was killed by SIGKILL; often out of memory")
    assert not left_over(ranks, 10)


@pytest.mark.parametrize("phase", ["loading", "steps"])
def test_no_rank_outlives_a_killed_launcher(start: Start, phase: str) -> None:
    run = start(phase)
    ranks = run.ranks(2)
    run.process.kill()
    assert not left_over(ranks, 30)
    assert len(list(run.folder.glob("saved-*"))) == (2 if phase == "steps" else 0)

"""Requests to stop, the deadline, and the watchdog, in a separate process where it ends one."""

from __future__ import annotations

import errno
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

from mpo_megatron.config import FaultConfig
from mpo_megatron.train import launched
from mpo_megatron.train.faults import signals
from mpo_megatron.train.faults.stopping import LEAST_MARGIN, STARTED, Deadline
from mpo_megatron.train.faults.supervisor import RESTARTS, SLOW_STEPS, SlowRanks, was_restarted
from tests.distributed.launch import ROOT
from tests.waiting import TIMEOUT


def python(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_the_deadline_leaves_time_for_a_step_and_a_save(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    assert not Deadline(FaultConfig()).is_near(1e9, 1e9)
    now = time.time()
    monkeypatch.setenv(STARTED, str(now - 3600))  # started an hour ago, restarted just now
    assert Deadline(FaultConfig(walltime_minutes=60)).is_near(1.0, 0.0)
    assert not Deadline(FaultConfig(walltime_minutes=60 + 2 * LEAST_MARGIN / 60)).is_near(1.0, 0.0)
    slow_save = Deadline(FaultConfig(walltime_minutes=60 + 30))
    assert not slow_save.is_near(100.0, 700.0)  # 100 + 2 × 700 < 1800 s
    assert slow_save.is_near(100.0, 860.0)
    slow_step = Deadline(FaultConfig(walltime_minutes=60 + 30))
    assert slow_step.is_near(1800.0, 0.0)
    assert slow_step.is_near(1.0, 0.0)  # a similarly slow step may follow
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now + 90)))
    slurm = Deadline(FaultConfig())
    assert not slurm.is_near(1.0, 0.0)
    assert slurm.is_near(31.0, 0.0)


@pytest.mark.parametrize("jump", [-7200.0, 7200.0])
def test_a_clock_that_is_set_moves_no_deadline(monkeypatch: pytest.MonkeyPatch, jump: float) -> None:
    monkeypatch.setenv(STARTED, str(time.time()))
    near, far = Deadline(FaultConfig(walltime_minutes=0.5)), Deadline(FaultConfig(walltime_minutes=30))
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    assert near.is_near(1.0, 0.0)
    assert not far.is_near(1.0, 0.0)


def test_a_slow_rank_is_told_of_with_its_machine_when_it_stays_slow() -> None:
    slow = SlowRanks(["node1", "node2"])
    told = [slow.note(1, 1.3) for _ in range(10 * SLOW_STEPS)]
    assert [step for step, text in enumerate(told, start=1) if text] == [SLOW_STEPS, 10 * SLOW_STEPS]
    assert (told[SLOW_STEPS - 1] or "").startswith(
        "SLOW: rank 1 on node2 was the slowest of the last 20 steps, now 1.30 times the mean"
    )
    assert [slow.note(rank, 2.0) for rank in (0, 1) * SLOW_STEPS] == [None] * 2 * SLOW_STEPS  # each in turn: noise
    assert [slow.note(0, 1.05) for _ in range(50)] == [None] * 50  # hardly slow
    assert [slow.note(0, 1.2) is None for _ in range(SLOW_STEPS)] == [True] * (SLOW_STEPS - 1) + [False]


FULL = """
import os
from mpo_megatron.train.rank import be_rank

def work():
    raise OSError(int(os.environ["NUMBER"]), "no more", "run/metrics.jsonl")

be_rank("mpo train", work)
"""


@pytest.mark.parametrize(("number", "code"), [(errno.ENOSPC, 2), (errno.ECONNRESET, 1)])
def test_a_full_disk_needs_a_person_whichever_rank_and_file_meets_it(
    monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    monkeypatch.setenv("NUMBER", str(number))
    monkeypatch.setenv("RANK", "3")
    process = python(FULL)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == code, errors
    assert "run/metrics.jsonl" in errors
    last = f"mpo train: rank 3 on {socket.gethostname()}: run/metrics.jsonl: no more; fix it, then run the same command again"
    assert (last in errors) == (code == 2)
    assert ("Traceback" in errors) == (code == 1)


def test_a_run_that_was_started_again_is_told_by_torchrun_or_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RESTARTS:
        monkeypatch.delenv(name, raising=False)
    assert not was_restarted()
    for name in RESTARTS:
        monkeypatch.setenv(name, "0")
        assert not was_restarted()
        monkeypatch.setenv(name, "2")
        assert was_restarted()
        monkeypatch.delenv(name)


LISTEN = """
import os, signal, sys, time
from mpo_megatron.train.faults import signals
assert not {"torch", "psutil", "numpy"} & set(sys.modules)  # heard before anything heavy is imported
class Slow:
    def __del__(self):  # at the interpreter's end, when it has gone back to dying of signals
        os.kill(os.getpid(), signal.SIGUSR1)
        time.sleep(0.1)

signals.listen("mpo train")
with signals.deferred():
    print("listening", flush=True)
    while signals.requested() is None:
        time.sleep(0.01)
    print(signals.requested().name, flush=True)
    signals.ignore()
slow = Slow()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_signals_are_noted_and_end_no_process_even_at_its_end(number: signal.Signals) -> None:
    process = python(LISTEN)
    assert process.stdout is not None
    assert process.stdout.readline() == "listening\n"
    process.send_signal(number)
    output, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, output) == (0, f"{number.name}\n"), errors


LOADING = """
import time
from mpo_megatron.train.faults import signals
signals.listen("mpo reference")
signals.leave_with(143)
print("loading", flush=True)
time.sleep(1000)
"""


@pytest.mark.parametrize("launcher", [False, True])
@pytest.mark.parametrize("sent", ["signal", "file"])
def test_a_rank_with_nothing_to_save_leaves_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: bool, sent: str
) -> None:
    if launcher:
        monkeypatch.setenv(launched.FOLDER, str(tmp_path))
        monkeypatch.setenv(launched.EXIT_FILE, str(tmp_path / launched.EXIT_CODE))
    elif sent == "file":
        pytest.skip("without a launcher there is no file")
    process = python(LOADING)
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    if sent == "signal":
        process.send_signal(signal.SIGUSR1)
    else:
        launched.write_request(signal.SIGINT, tmp_path)
    _, errors = process.communicate(timeout=TIMEOUT)
    name = "SIGUSR1" if sent == "signal" else "SIGINT"
    sentence = f"mpo reference: stopped ({name}) before there was anything new to save; run the same command again."
    if launcher:  # which prints the message when all ranks have ended, and exits with the code
        assert (process.returncode, errors) == (0, "")
        assert (tmp_path / launched.EXIT_CODE).read_text() == "143"
        assert (tmp_path / launched.LAST_WORDS).read_text() == sentence
        assert launched.read_request(tmp_path) == signal.Signals[name]  # the other ranks look for it
    else:
        assert (process.returncode, errors) == (143, sentence + "\n")


ALONE = """
import os, signal, subprocess, sys, time
from mpo_megatron.train.faults import signals
if len(sys.argv) == 1:  # torchrun, with one rank of two left
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "2", "RANK": "1"}
    command = [sys.executable, "-c", os.environ["CODE"], "rank"]
    ranks = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    other = subprocess.Popen(["sleep", "1000"])  # no rank
    for rank in ranks:
        rank.stdout.readline()
    if os.environ["DEAD"] == "1":
        ranks[0].kill()
    ranks[1].send_signal(signal.SIGTERM)
    print(ranks[1].stdout.readline().strip() or ranks[1].wait(), flush=True)
    for process in (*ranks, other):
        process.kill()
else:
    signals.listen()
    with signals.deferred():
        print("listening", flush=True)
        while signals.requested() is None:
            time.sleep(0.01)  # a collective
        print("goes on", flush=True)
        time.sleep(1000)
"""


@pytest.mark.parametrize("dead, outcome", [(True, "143"), (False, "goes on")])
def test_a_rank_whose_neighbour_has_died_leaves_at_once(monkeypatch: pytest.MonkeyPatch, dead: bool, outcome: str) -> None:
    monkeypatch.setenv("CODE", ALONE)
    monkeypatch.setenv("DEAD", str(int(dead)))
    output, errors = python(ALONE).communicate(timeout=TIMEOUT)
    assert output.strip() == outcome, errors


def test_neighbours_that_end_while_they_are_counted_end_no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    gone, unreadable = mock.Mock(), mock.Mock()
    gone.status.side_effect = psutil.NoSuchProcess(1)
    unreadable.cmdline.side_effect = psutil.AccessDenied(2)
    alive = mock.Mock(**{"status.return_value": psutil.STATUS_RUNNING, "cmdline.return_value": ["rank"]})
    parent = mock.Mock(**{"children.return_value": [gone, alive, unreadable], "cmdline.return_value": ["rank"]})
    monkeypatch.setattr(psutil, "Process", lambda *_: parent)
    assert signals._count_ranks(1) == 1
    parent.children.side_effect = psutil.NoSuchProcess(3)
    assert signals._count_ranks(1) == 0


ORPHAN = """
import os, subprocess, sys, time
from mpo_megatron.train.faults import signals
if len(sys.argv) == 1:
    environment = {**os.environ, "TORCHELASTIC_RUN_ID": "x", "LOCAL_WORLD_SIZE": "1", "RANK": "0"}
    rank = subprocess.Popen([sys.executable, "-c", os.environ["CODE"], "rank"], env=environment, stdout=subprocess.PIPE)
    rank.stdout.readline()
    os._exit(0)  # as if killed
else:
    signals.listen()
    with signals.deferred():
        print("listening", flush=True)
        while signals.requested() is None:
            time.sleep(0.01)
        print(signals.requested().name, file=sys.stderr, flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a death signal is Linux's")
def test_a_rank_whose_launcher_is_killed_is_asked_to_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CODE", ORPHAN)
    _, errors = python(ORPHAN).communicate(timeout=TIMEOUT)
    assert errors == "SIGTERM\n"


HANG = """
import sys, threading
from pathlib import Path
from mpo_megatron.config import FaultConfig
from mpo_megatron.train.faults.supervisor import Watchdog

def all_reduce_that_never_returns():
    threading.Event().wait()

watchdog = Watchdog(FaultConfig(hang_minutes=30), Path(sys.argv[1]), rank=3)
for step in range(3):
    watchdog.beat(f"step {step}")
watchdog.seconds = 0.5
all_reduce_that_never_returns()
"""


def test_the_watchdog_names_rank_and_step_and_shows_where_it_hangs(tmp_path: Path) -> None:
    process = python(HANG, str(tmp_path))
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert f"rank 3 on {socket.gethostname()}: no progress for" in errors
    [path] = (tmp_path / "incidents").iterdir()
    assert path.name == "hang_step_2_rank_00003.txt"
    text = path.read_text()
    assert "in step 2" in text
    assert "all_reduce_that_never_returns" in text

"""One writer at a time, and its identity."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_megatron.files import DataError
from mpo_megatron.files.lock import hold
from tests.distributed.launch import ROOT
from tests.waiting import TIMEOUT

HOLD = """
import sys, time
from pathlib import Path
from mpo_megatron.files.lock import hold
with hold(Path(sys.argv[1]), Path("run")):
    print("held", flush=True)
    time.sleep(1000)
"""


def test_a_second_one_is_refused_and_told_who_the_first_is(tmp_path: Path) -> None:
    lock = tmp_path / "new" / ".lock"
    refused = pytest.raises(DataError, match=rf"run: another run is writing it \(process {os.getpid()} on .+\)")
    with hold(lock, tmp_path / "run"), refused, hold(lock, tmp_path / "run"):
        pass
    with hold(lock, tmp_path / "run"):  # free again
        pass


def test_a_lock_ends_with_the_process_that_is_killed_and_may_be_waited_for(tmp_path: Path) -> None:
    command = [sys.executable, "-c", HOLD, str(tmp_path / ".lock")]
    process = subprocess.Popen(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"held\n"
    with pytest.raises(DataError, match=f"process {process.pid} on"), hold(tmp_path / ".lock", tmp_path):
        pass
    process.kill()
    with hold(tmp_path / ".lock", tmp_path, wait_seconds=TIMEOUT):
        assert (tmp_path / ".lock").read_text().startswith(f"process {os.getpid()} on ")
    process.wait()


def test_where_there_are_no_locks_work_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with hold(tmp_path / ".lock", tmp_path), hold(tmp_path / ".lock", tmp_path):
        pass


def test_a_process_that_was_forked_meanwhile_does_not_keep_the_lock(tmp_path: Path) -> None:
    with hold(tmp_path / ".lock", tmp_path):
        child = os.fork()
        if child == 0:
            signal.pause()
    try:
        with hold(tmp_path / ".lock", tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

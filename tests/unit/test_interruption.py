"""Requests to stop a command of one process, and output whose reader has gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from mpo_megatron.cli import COMMANDS, OUTLIVES_READERS, main
from tests.distributed.launch import ROOT
from tests.foreground import obey_signals


@pytest.fixture(autouse=True)
def obeyed() -> Iterator[None]:
    """Signals as in a terminal."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGHUP)}
    obey_signals()
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "code"), [("SIGTERM", 75), ("SIGUSR1", 75), ("SIGHUP", 75), ("SIGINT", 130)])
def test_a_command_cleans_up_and_says_how_to_resume(
    number: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cleaned: list[str] = []

    def work(arguments: object) -> int:
        try:
            os.kill(os.getpid(), signal.Signals[number])
            signal.pause()
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # again while it cleans up: no effect
            cleaned.append("all")
        return 0

    if number == "SIGINT":  # a second one is not ignored: users end long clean-ups this way
        monkeypatch.setitem(COMMANDS, "select", lambda arguments: os.kill(os.getpid(), signal.SIGINT) or signal.pause() or 0)
        cleaned.append("all")
    else:
        monkeypatch.setitem(COMMANDS, "select", work)
    before = signal.getsignal(signal.SIGTERM)
    assert main(["select"]) == code
    assert cleaned == ["all"]
    assert signal.getsignal(signal.SIGTERM) is before
    said = f"mpo select: stopped ({number}); completed work is kept: run the same command again to resume.\n"
    assert capsys.readouterr().err == said


def test_a_forked_worker_is_ended_by_its_signal(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(arguments: object) -> int:
        worker = os.fork()
        if worker == 0:
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        return os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])

    monkeypatch.setitem(COMMANDS, "select", work)
    assert main(["select"]) == -signal.SIGTERM


HEAD = """
import sys
from collections.abc import Iterator
from pathlib import Path
from mpo_megatron.terminal.output import outlive_readers
outlive_readers()
outlive_readers()
for number in range(100_000):
    print("step", number, flush=True)
print("errors go where they went", file=sys.stderr)
Path(sys.argv[1]).touch()
"""


def test_work_goes_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    """`mpo train | head`."""
    assert {"train", "iterate", "reference", "evaluate"} <= set(OUTLIVES_READERS) <= set(COMMANDS)
    command = [sys.executable, "-c", HEAD, str(tmp_path / "done")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline() == "step 0\n"
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (0, "errors go where they went\n")
    assert (tmp_path / "done").is_file()

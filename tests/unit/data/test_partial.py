"""Leftovers of killed processes are removed by the next writer of the same output; those of live processes stay."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from mpo_megatron.cli import main
from mpo_megatron.config import ConfigError
from mpo_megatron.files import DataError
from mpo_megatron.files.atomic import AtomicFolder, replace_file
from mpo_megatron.files.partial import clear_leftovers, find_writer, partial_file, partial_folder
from mpo_megatron.model.convert_folder import staged
from tests.distributed.launch import ROOT
from tests.tiny import save_tokenizer

WRITE = """
import sys, time
from pathlib import Path
from mpo_megatron.files.partial import partial_file, partial_folder
target = Path(sys.argv[1])
with partial_folder(target) as folder, partial_file(target) as (path, file):
    (folder / "weights").write_text("1")
    print(folder, path, flush=True)
    time.sleep(1000)
"""


@pytest.fixture
def writer(tmp_path: Path):
    """A process that is writing a folder and a file `out`, and its paths."""
    command = [sys.executable, "-c", WRITE, str(tmp_path / "out")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    yield process, *map(Path, process.stdout.readline().split())
    process.kill()
    process.wait()


def test_what_a_live_process_writes_stays_and_it_is_named(tmp_path: Path, writer) -> None:
    process, folder, path = writer
    clear_leftovers(tmp_path / "out")
    assert (folder / "weights").is_file()
    assert path.is_file()
    assert (find_writer(tmp_path / "out") or "").startswith(f"process {process.pid} on ")
    for refused in (lambda: AtomicFolder(tmp_path / "out"), staged(tmp_path / "out", 1).__enter__):
        with pytest.raises(DataError, match=rf"out: another run is writing it \(process {process.pid} on .+\); wait for it"):
            refused()
    replace_file(tmp_path / "out", [b"1"])  # of files, the last write counts
    assert path.is_file()


@pytest.mark.parametrize("rerun", ["folder", "staged", "file"])
def test_a_rerun_clears_what_a_killed_process_left_and_only_that(tmp_path: Path, writer, rerun: str) -> None:
    process, folder, path = writer
    process.kill()
    process.wait()
    assert find_writer(tmp_path / "out") is None
    others = [tmp_path / name for name in (".out2.partial-0", ".out.partial", "out.partial-0")]
    for other in others:
        other.mkdir()
    assert folder.is_dir()
    if rerun == "folder":
        with AtomicFolder(tmp_path / "out") as output:
            output.commit()
    elif rerun == "staged":
        with staged(tmp_path / "out", 1):
            pass
    else:
        replace_file(tmp_path / "out", [b"1"])
    assert not folder.exists()
    assert not path.exists()
    assert sorted(tmp_path.iterdir()) == sorted([tmp_path / "out", *others])


def test_a_folder_without_an_owner_is_cleared(tmp_path: Path) -> None:
    (tmp_path / ".out.partial-1" / "deep").mkdir(parents=True)
    with partial_folder(tmp_path / "out"):
        assert not (tmp_path / ".out.partial-1").exists()
    assert list(tmp_path.iterdir()) == []


def test_the_same_process_id_blocks_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, every command is process 1."""
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with partial_folder(tmp_path / "out") as first:
        pass
    first.mkdir()  # as if killed
    with partial_folder(tmp_path / "out") as second:
        assert not first.exists()
        assert second != first


def test_a_file_that_was_taken_for_a_leftover_before_it_was_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, calls = fcntl.flock, []

    def late(file, operation: int) -> None:
        calls.append(operation)
        if len(calls) == 1:
            monkeypatch.setattr(fcntl, "flock", flock)
            clear_leftovers(tmp_path / "out")
        flock(file, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with partial_file(tmp_path / "out") as (path, _):
        assert path.is_file()
    assert len(calls) == 1


def test_where_there_are_no_locks_nothing_that_may_be_alive_is_cleared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: object) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    with partial_folder(tmp_path / "out") as first, partial_folder(tmp_path / "out") as second:
        assert first.is_dir()
        assert second.is_dir()
    assert list(tmp_path.iterdir()) == []


def test_a_conversion_that_failed_leaves_nothing(tmp_path: Path) -> None:
    def fill() -> None:
        with staged(tmp_path / "out", 1) as folder:
            (folder / "weights").write_text("1")
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(ConfigError, match="No space left on device"):
        fill()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["folder", "staged"])
def test_of_two_that_began_together_the_second_leaves_what_the_first_has_written(tmp_path: Path, kind: str) -> None:
    def write() -> None:
        if kind == "folder":
            with AtomicFolder(tmp_path / "out") as output:
                other()
                output.commit()
        else:
            with staged(tmp_path / "out", 1):
                other()

    def other() -> None:
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "weights").write_text("1")

    with pytest.raises(DataError, match=r"out: another run has written it in the meantime"):
        write()
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "weights"]


@pytest.mark.parametrize(
    "command",
    [
        "convert --input {0}/model --output {0}/out",
        "prepare --input {0}/groups.jsonl --tokenizer {0}/hf --output {0}/out",
        "select --input {0}/scored.jsonl --output {0}/out",
    ],
)
def test_what_a_kill_after_the_last_rename_left_is_cleared_although_the_output_is_complete(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The output is complete; its writer's lock file remains, and nobody holds it."""
    (tmp_path / "model" / "megatron").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "complete").touch()
    for name in ("groups.jsonl", "scored.jsonl"):
        (tmp_path / name).write_text('{"prompt": "p", "responses": [{"text": "a", "reward": 1}, {"text": "b", "reward": 0}]}\n')
    save_tokenizer(tmp_path / "hf")
    left = tmp_path / ".out.partial-1f3c9a2b.lock"
    left.touch()
    assert main(command.format(tmp_path).split()) == 2
    assert re.search("is not an empty folder; remove it|is not empty; choose a new folder", capsys.readouterr().err)
    assert not left.exists()
    assert (tmp_path / "out" / "complete").is_file()

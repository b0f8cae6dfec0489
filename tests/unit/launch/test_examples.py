"""The files of examples/launch equal the output of the commands in its README."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from mpo_megatron.cli import main

FOLDER = Path(__file__).parents[3] / "examples" / "launch"
COMMANDS = [line for line in (FOLDER / "README.md").read_text().splitlines() if line.startswith("mpo launch")]
WRITTEN = {shlex.split(line)[-1] for line in COMMANDS}


def test_every_file_is_listed() -> None:
    assert {path.name for path in FOLDER.iterdir()} - {"README.md", "train.yaml", "generate.yaml"} == WRITTEN


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: shlex.split(command)[-1])
def test_a_command_writes_its_file(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for path in FOLDER.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    monkeypatch.chdir(tmp_path)
    arguments = shlex.split(command)
    (tmp_path / arguments[-1]).unlink(missing_ok=True)
    assert main(arguments[1:]) == 0
    assert (tmp_path / arguments[-1]).read_text() == (FOLDER / arguments[-1]).read_text()

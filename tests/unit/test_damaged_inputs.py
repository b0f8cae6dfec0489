"""Commands on damaged inputs: one sentence that names the file, or a result; never a traceback.

`DAMAGE_TRIALS=50 pytest tests/unit/test_damaged_inputs.py` tries more.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.damaged_commands import COMMANDS, RESEALED, files_of, run_damaged, without_processes, write_inputs

TRIALS = int(os.environ.get("DAMAGE_TRIALS", "2"))
"""Of each file."""
OPTION = re.compile(r"[: ][a-z_]+(\.[a-z_]+)* = ")
"""The option that a configuration's message names."""
WHOLE = {"doctor": (0, 1)}
"""Exit codes of a command on whole inputs, if not 0: some machine's problems."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with small inputs of every command tried here."""
    folder = tmp_path_factory.mktemp("damaged")
    with without_processes():
        write_inputs(folder)
        yield folder


@pytest.mark.parametrize("command", COMMANDS)
def test_damaged_inputs_end_in_a_sentence(command: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = files_of(command, folder)
    whole = run(command, folder, files[0], None, tmp_path / "whole")
    assert whole in WHOLE.get(command, (0,)), capsys.readouterr().err
    for file, seed in itertools.product(files, range(TRIALS)):
        capsys.readouterr()
        code = run(command, folder, file, seed, tmp_path / f"{file.replace('/', '-')}-{seed}")
        said = capsys.readouterr().err.splitlines()
        if code != 2:
            assert code in (0, whole) or command == "doctor", said
            continue
        assert said[-1].startswith(f"mpo {command.partition(',')[0].partition(' ')[0]}: "), said
        path = Path(file.removesuffix(RESEALED))
        places = (path.name, path.parent.name, str(folder / path.parts[0]))
        assert any(place in said[-1] for place in places) or OPTION.search(said[-1]), said[-1]
        assert len(said[-1]) < 2000


def run(command: str, folder: Path, file: str, seed: int | None, out: Path) -> int:
    out.mkdir()
    try:
        return run_damaged(command, folder, file, seed, out)
    except Exception as error:
        raise AssertionError(f"{command}: {file} with seed {seed}") from error

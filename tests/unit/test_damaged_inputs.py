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

from mpo_megatron.files import digests
from tests.damaged_commands import COMMANDS, RESEALED, files_of, run_damaged, without_processes, write_inputs

TRIALS = int(os.environ.get("DAMAGE_TRIALS", "2"))
"""Of each file."""
OPTION = re.compile(r"[: ][a-z_]+(\.[a-z_]+)* = ")
"""The option that a configuration's message names."""
LISTS = (digests.LIST, digests.STATE)
"""Files that hold digests of others."""
CONTRADICTED = (digests.STATE, "tokenizer.json", "tokenizer_config.json")
"""Files whose values a command compares with its options, or passes to `transformers`, which does not name the file. A YAML file
is another: its values are options."""
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
        assert names_file(said[-1], folder, Path(file.removesuffix(RESEALED))), said[-1]
        assert len(said[-1]) < 2000


def names_file(message: str, folder: Path, path: Path) -> bool:
    """Whether a message names the damaged file, by its whole path or below its top folder.

    A value of the right form may only contradict something else: then naming the option is enough. A damaged list of digests
    contradicts a file of its folder.
    """
    inner = Path(*path.parts[1:]) if path.parent.name else path
    if any(place in message for place in (str(folder / path), str(inner))):
        return True
    if path.name in LISTS and f" {(folder / path).parent}/" in message:
        return True
    return path.suffix == ".yaml" or (path.name in CONTRADICTED and OPTION.search(message) is not None)


def run(command: str, folder: Path, file: str, seed: int | None, out: Path) -> int:
    out.mkdir()
    try:
        return run_damaged(command, folder, file, seed, out)
    except Exception as error:
        raise AssertionError(f"{command}: {file} with seed {seed}") from error

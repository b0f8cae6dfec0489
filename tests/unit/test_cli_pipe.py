"""The command line in a pipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("argument", ["losses", "--help"])
def test_a_reader_that_leaves_early_gets_no_traceback(argument: str) -> None:
    """`mpo losses | head`: the exit status is the shell's for SIGPIPE."""
    command = [sys.executable, "-m", "mpo_megatron.cli", argument]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
    assert (process.returncode, errors) == (141, b"")

"""The scripts of `make`: they find an interpreter by running candidates, and install packages by uv or, without it, by pip."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.waiting import TIMEOUT

TOOLS = Path(__file__).parents[2] / "tools"
WORKS = f'exec "{sys.executable}" "$@"\n'
OLD = "exit 1  # its version is out of range\n"
SHIM = 'echo "pyenv: python3.12: command not found" >&2; exit 127\n'

Program = Callable[[str, str], Path]


@pytest.fixture
def program(tmp_path: Path) -> Program:
    """Writes an executable script into the test's folder."""

    def write(path: str, script: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"#!/bin/sh\n{script}")
        file.chmod(0o755)
        return file

    return write


def run(tmp_path: Path, script: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A script that finds only the test's programs and those of /usr/bin, without a python3."""
    for name in ("bash", "cat", "timeout", "env", "sh"):
        link = tmp_path / "bin" / name
        if not link.exists():
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(next(path for path in (Path("/usr/bin", name), Path("/bin", name)) if path.exists()))
    values = {"PATH": str(tmp_path / "bin"), "HOME": str(tmp_path), **environment}
    return subprocess.run(
        [str(tmp_path / "bin" / "bash"), str(TOOLS / script), *arguments],
        env=values,
        capture_output=True,
        text=True,
        check=False,
        timeout=TIMEOUT,
    )


def test_pythons_are_run_before_they_are_chosen(tmp_path: Path, program: Program) -> None:
    program("bin/python3", OLD)
    program("bin/python3.12", SHIM)
    program(".pyenv/versions/3.11.7/bin/python", WORKS)  # not tried
    broken = program(".pyenv/versions/3.12.1/bin/python", OLD)
    good = program(".pyenv/versions/3.13.0/bin/python", WORKS)
    assert run(tmp_path, "find_python.sh").stdout.strip() == str(good)
    broken.write_text(f"#!/bin/sh\n{WORKS}")
    assert run(tmp_path, "find_python.sh").stdout.strip() == str(broken)
    program("bin/python3", WORKS)
    assert run(tmp_path, "find_python.sh").stdout.strip() == "python3"


def test_pyenv_elsewhere_and_uv(tmp_path: Path, program: Program) -> None:
    managed = program("managed/python3.12", WORKS)
    program("bin/uv", f'[ "$4" = 3.12 ] && echo "{managed}"\n')
    assert run(tmp_path, "find_python.sh").stdout.strip() == str(managed)
    other = program("elsewhere/versions/3.12.9/bin/python", WORKS)
    assert run(tmp_path, "find_python.sh", PYENV_ROOT=str(tmp_path / "elsewhere")).stdout.strip() == str(other)


def test_without_any_it_says_what_to_install(tmp_path: Path, program: Program) -> None:
    program("bin/python3", OLD)
    ended = run(tmp_path, "find_python.sh")
    assert ended.returncode == 1
    assert not ended.stdout
    for advice in ("apt install python3.12", "pyenv install 3.12", "uv python install 3.12", "make PYTHON="):
        assert advice in ended.stderr


def test_a_named_python_is_taken_or_refused(tmp_path: Path, program: Program) -> None:
    named = program("other/python", WORKS)
    assert run(tmp_path, "find_python.sh", PYTHON=str(named)).stdout.strip() == str(named)
    ended = run(tmp_path, "find_python.sh", PYTHON="python3.9")
    assert ended.returncode == 1
    assert "PYTHON=python3.9 is not a Python 3.12 or 3.13" in ended.stderr


def test_uv_installs_and_pip_if_it_fails(tmp_path: Path, program: Program) -> None:
    program(".venv/bin/python", 'case "$1" in -c) exit 0;; *) echo "pip $*";; esac\n')
    uv = program("bin/uv", 'echo "uv $*"\n')
    venv = str(tmp_path / ".venv")
    ended = run(tmp_path, "install.sh", venv, "--editable", ".")
    assert ended.stdout == f"uv pip install --quiet --python {venv}/bin/python --editable .\n"
    uv.write_text("#!/bin/sh\nexit 2\n")
    ended = run(tmp_path, "install.sh", venv, "--editable", ".")
    assert ended.stdout == "pip -m pip --disable-pip-version-check install --quiet --editable .\n"
    assert "installing with pip instead" in ended.stderr
    uv.unlink()
    first, second = run(tmp_path, "install.sh", venv, "torch").stdout.splitlines()
    assert first.endswith("install --quiet uv>=0.9,<1")
    assert second.endswith("install --quiet torch")


def test_an_old_virtual_environment_is_named(tmp_path: Path, program: Program) -> None:
    program(".venv/bin/python", 'case "$1" in -c) exit 1;; *) echo "Python 3.11.7";; esac\n')
    ended = run(tmp_path, "install.sh", str(tmp_path / ".venv"), "torch")
    assert ended.returncode == 1
    assert "has Python 3.11.7, not 3.12 or 3.13; delete it (rm -r " in ended.stderr


def test_the_range_is_that_of_setup() -> None:
    setup = (TOOLS.parent / "setup.py").read_text()
    assert 'python_requires=">=3.12,<3.14"' in setup
    for script in ("find_python.sh", "install.sh"):
        assert "(3, 12) <= sys.version_info[:2] <= (3, 13)" in (TOOLS / script).read_text()
    assert os.access(TOOLS / "find_python.sh", os.X_OK)
    assert os.access(TOOLS / "install.sh", os.X_OK)

"""Ranks not launched by `mpo train`, as under srun: on a stop request during start-up they exit together without waiting."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.distributed.launch import ON_CPU, ROOT, _be_rank, _fork_server, free_port
from tests.waiting import TIMEOUT

pytestmark = pytest.mark.distributed


def run(phase: str, folder: Path, ranks: int) -> list[tuple[int | None, str]]:
    """Exit code and stderr of each of the first `ranks` of two ranks, whose store is in rank 0."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MPO_", "TORCHELASTIC_"))}
    environment |= {**ON_CPU, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "WORLD_SIZE": "2"}
    environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    worker = "tests.distributed.joining_worker", [phase]
    processes, outputs = [], []
    for rank in range(ranks):
        own = environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        outputs.append([folder / f"{rank}.out", folder / f"{rank}.err"])
        process = _fork_server().Process(target=_be_rank, args=(own, ROOT, outputs[-1], *worker))
        process.start()
        processes.append(process)
    ended = []
    for process, (_, errors) in zip(processes, outputs, strict=True):
        process.join(TIMEOUT)
        ended.append((process.exitcode, errors.read_text()))
        process.kill()
    return ended


@pytest.mark.parametrize("phase", ["starting", "loading"])
def test_a_request_to_one_rank_that_starts_takes_the_others_along(phase: str, tmp_path: Path) -> None:
    ended = run(phase, tmp_path, 2)
    assert [code for code, _ in ended] == [75, 75], ended
    sentence = "mpo train: stopped (SIGUSR1) before there was anything new to save; run the same command again."
    assert ended[0][1].splitlines()[-1] == sentence
    assert not any("Traceback" in errors for _, errors in ended)


def test_a_rank_whose_others_never_come_leaves_alone(tmp_path: Path) -> None:
    [(code, errors)] = run("alone", tmp_path, 1)
    assert code == 75, errors
    assert "stopped (SIGUSR1)" in errors.splitlines()[-1]


def test_waiting_for_others_ends_with_a_sentence_that_says_where_to_look(tmp_path: Path) -> None:
    [(code, errors)] = run("waiting", tmp_path, 1)
    assert code == 1, errors
    assert "mpo train: rank 0 of 2 waited for the others at 127.0.0.1:" in errors.splitlines()[-1]
    assert "parallel.timeout_minutes = 0.02 minutes, but not all of them connected; look for a rank that ended or never" in errors
    assert "Traceback" not in errors

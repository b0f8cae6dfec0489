"""Rendered jobs run: several torchrun agents as separate machines, and a real Slurm that stops and restarts a run."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from mpo_megatron.config import ConvertConfig, SlurmJob, TorchrunJob
from mpo_megatron.launch.launch import render
from mpo_megatron.model.convert import convert
from tests.distributed.launch import ROOT
from tests.distributed.slurm import installed, slurm
from tests.tiny import random_groups, save_groups, save_model
from tests.waiting import TIMEOUT

# The scripts call `python` and `mpo`: those of the environment that runs the tests.
ENVIRONMENT = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model and training groups."""
    folder = tmp_path_factory.mktemp("launch")
    convert(ConvertConfig(input=str(save_model(folder / "hf", num_hidden_layers=2)), output=str(folder / "model")))
    save_groups(folder / "train", random_groups(24, seed=1), folder / "hf")
    return folder


def write_config(inputs: Path, output: Path, **changes: Any) -> str:
    """A training configuration with two tensor-parallel ranks."""
    config = {
        "output": str(output),
        "model": {"checkpoint": str(inputs / "model"), "precision": "fp32"},
        "data": {"train": str(inputs / "train"), "groups_per_step": 8, "row_tokens": 256},
        "parallel": {"tensor": 2},
        "optimizer": {"lr": 1e-3},
        **changes,
    }
    path = output.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(config))
    return str(path)


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in line]


def run_script(inputs: Path, run: Path, **job: Any) -> list[float]:
    """Train two steps with a rendered script, started once per machine; the losses."""
    config = write_config(inputs, run, max_steps=2, parallel={})
    settings = {"gpus_per_node": 0, "max_restarts": 0, "environment": {"OMP_NUM_THREADS": "1"}}
    script = run.with_suffix(".sh")
    script.write_text(render(TorchrunJob(train=config, **settings, **job))[0])
    port = str(20_000 + os.getpid() % 10_000)
    machines = [
        subprocess.Popen(
            ["bash", str(script)],
            cwd=ROOT,
            env={**ENVIRONMENT, "MASTER_ADDR": "localhost", "MASTER_PORT": port, "NODE_RANK": str(number)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for number in range(job["nodes"])
    ]
    for machine in machines:
        output, _ = machine.communicate(timeout=TIMEOUT)
        assert machine.returncode == 0, output[-4000:]
    return losses(run)


@pytest.fixture(scope="module")
def one_machine(inputs: Path) -> list[float]:
    """Losses of one machine with two ranks."""
    return run_script(inputs, inputs / "one-machine", nodes=1, ranks_per_node=2)


@pytest.mark.parametrize("rendezvous", ["static", "c10d"])
def test_two_machines(inputs: Path, one_machine: list[float], rendezvous: Any) -> None:
    """Two agents on loopback, one rank each, train what one agent with two ranks trains."""
    two = run_script(inputs, inputs / rendezvous, nodes=2, ranks_per_node=1, rendezvous=rendezvous)
    assert len(two) == 2
    assert two == pytest.approx(one_machine, rel=1e-6)


@contextlib.contextmanager
def submitted(job: SlurmJob, folder: Path) -> Iterator[tuple[str, Callable[..., str]]]:
    """A job in a private Slurm: its number, and a function that calls Slurm's commands."""
    script = folder / "job.sh"
    script.write_text(render(job)[0])
    (folder / "slurm").mkdir()
    with slurm(folder / "slurm") as environment:
        environment["PATH"] = ENVIRONMENT["PATH"]

        def call(*command: str) -> str:
            return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout

        yield call("sbatch", "--parsable", str(script)).strip(), call


@pytest.mark.skipif(not installed(), reason="needs Slurm's daemons (Debian: slurmctld slurmd slurm-client munge), and root")
def test_slurm_requeues_a_run_that_was_asked_to_stop(inputs: Path, tmp_path: Path) -> None:
    """SIGUSR1 during training: the run saves, the job requeues itself, and the second start finishes."""
    run = tmp_path / "run"
    job = SlurmJob(
        train=write_config(inputs, run, max_steps=150, checkpoint={"every": 0}),
        gpus_per_node=0,
        ranks_per_node=2,
        environment={"OMP_NUM_THREADS": "1"},
        time="00:20:00",
        logs=str(tmp_path),
    )
    with submitted(job, tmp_path) as (number, call):
        wait_for(lambda: (run / "metrics.jsonl").is_file() and len(losses(run)) >= 3, tmp_path, pause=0.05)
        call("scancel", "--signal=USR1", number)
        wait_for(lambda: "JobState=COMPLETED" in call("scontrol", "show", "job", number), tmp_path)
    assert len(losses(run)) == 150
    output = (tmp_path / f"mpo-{number}.log").read_text()
    assert "stopped in good order; queued again" in output
    assert "restart 1" in output


FAILS = """\
#!/usr/bin/env bash
[[ "$RANK" -eq 1 ]] && exit 1
trap '' TERM # as a rank in a collective
for second in {1..1000}; do sleep 1; done
"""


@pytest.mark.skipif(not installed(), reason="needs Slurm's daemons (Debian: slurmctld slurmd slurm-client munge), and root")
def test_slurm_ends_all_ranks_when_one_has_failed(inputs: Path, tmp_path: Path) -> None:
    (tmp_path / "python").write_text(FAILS)
    (tmp_path / "python").chmod(0o755)
    job = SlurmJob(
        train=write_config(inputs, tmp_path / "run"),
        gpus_per_node=0,
        ranks_per_node=2,
        cpus_per_rank=2,
        setup=f"export PATH={tmp_path}:$PATH",
        time="00:20:00",
        logs=str(tmp_path),
    )
    with submitted(job, tmp_path) as (number, call):

        def show() -> str:
            return call("scontrol", "show", "job", number)

        wait_for(lambda: "JobState=FAILED" in show(), tmp_path)
        assert "Requeue=1 Restarts=0" in show()


def wait_for(done: Any, logs: Path, pause: float = 0.5) -> None:
    """Wait until `done()`, at most four minutes."""
    deadline = time.monotonic() + TIMEOUT
    while not done():
        if time.monotonic() > deadline:
            ends = (f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(logs.rglob("*.log")))
            raise AssertionError("\n".join(ends))
        time.sleep(pause)

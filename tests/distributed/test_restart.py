"""A real `mpo train`: torchrun restarts its ranks after a failure; on a stop request, it saves and exits."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from mpo_megatron.config import ConvertConfig
from mpo_megatron.model.convert import convert
from mpo_megatron.train.checkpoints.step_folders import check_files, complete_steps, step_folder
from tests.distributed.launch import ROOT
from tests.tiny import random_groups, save_groups, save_model
from tests.waiting import TIMEOUT

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def steps(run: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in complete_steps(run)]


def steps_logged(run: Path) -> list[int]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["step"] for line in lines if "lr" in line]


def test_mpo_train_restarts_after_a_failed_rank_and_obeys_a_request(tmp_path: Path) -> None:
    """A rank is killed: torchrun restarts all. Then `mpo train` receives SIGTERM: exit code 75. The next start completes."""
    inputs, output = tmp_path, tmp_path / "run"
    convert(ConvertConfig(input=str(save_model(inputs / "hf", num_hidden_layers=2)), output=str(inputs / "model")))
    save_groups(inputs / "train", random_groups(24, seed=1), inputs / "hf")
    command = [
        *(sys.executable, "-m", "mpo_megatron.cli", "train", "--nproc", "2", "--max_restarts", "1", "--output", str(output)),
        *("--model.checkpoint", str(inputs / "model"), "--data.train", str(inputs / "train")),
        *("--data.groups_per_step", "8", "--data.row_tokens", "256", "--max_steps", "400", "--eval_every", "0"),
        *("--optimizer.lr", "1e-3", "--loss.params.beta", "0.1", "--model.precision", "fp32", "--checkpoint.every", "1"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with (inputs / "log").open("w") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT)
        wait_for_step(output, 3, process)
        ranks = [child for child in psutil.Process(process.pid).children() if "mpo_megatron.train" in child.cmdline()]
        assert len(ranks) == 2
        ranks[1].kill()
        killed_at = steps(output)[-1]
        wait_for_step(output, killed_at + 5, process)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=TIMEOUT) == 75
    text = (inputs / "log").read_text()
    assert "resuming from" in text
    assert "rank 1 was killed by SIGKILL; often out of memory: see dmesg; restarting all ranks (1 of 1)" in text
    assert text.splitlines()[-1] == "mpo train: stopped (SIGTERM) and saved; run the same command again to resume."
    assert "torch.distributed.elastic" not in text
    last = steps(output)[-1]
    check_files(step_folder(output, last))
    assert steps_logged(output) == list(range(1, last + 1))


def wait_for_step(output: Path, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + TIMEOUT
    while not steps(output) or steps(output)[-1] < step:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)

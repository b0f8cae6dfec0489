"""Stages as commands of their own."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from unittest.mock import MagicMock

import psutil
import pytest

from mpo_megatron.config import GenerateConfig, load_yaml
from mpo_megatron.rollout import stages
from tests.waiting import TIMEOUT


def test_a_command_of_its_own_gets_a_file_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The digits after a temperature's decimal point are not a file suffix."""
    monkeypatch.setattr(stages.device, "has_gpu", lambda: True)
    process = MagicMock(**{"wait.return_value": 3})
    process.__enter__.return_value = process
    monkeypatch.setattr(stages.subprocess, "Popen", lambda *_, **__: process)
    for name in ("turn-1-temperature-0.1", "turn-1-temperature-0.7"):
        config = GenerateConfig(prompts="p", model="m", output=str(tmp_path / name), num_responses=1)
        with pytest.raises(stages.StageError, match="generate ended with exit status 3"):
            stages.run_command("generate", print, config)
        assert load_yaml(GenerateConfig, tmp_path / f"{name}.yaml") == config


def test_a_command_of_its_own_is_asked_to_stop_before_the_process_that_started_it_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stages.device, "has_gpu", lambda: True)
    process = MagicMock(**{"wait.side_effect": [KeyboardInterrupt, 75]})
    process.__enter__.return_value = process
    monkeypatch.setattr(stages.subprocess, "Popen", lambda *_, **__: process)
    with pytest.raises(KeyboardInterrupt):
        stages.run_command("generate", print, GenerateConfig(prompts="p", model="m", output=str(tmp_path / "o"), num_responses=1))
    assert [call[0] for call in process.method_calls] == ["wait", "terminate", "wait"]


def test_a_command_of_its_own_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    """Otherwise it would keep the GPU and the lock, and the next start would be refused."""
    command = tmp_path / "python"
    command.write_text(f"#!/bin/sh\necho $$ > {tmp_path}/child\nexec sleep 600\n")
    command.chmod(0o755)
    program = (
        "from mpo_megatron.config import GenerateConfig\nfrom mpo_megatron.rollout import stages\n"
        f"stages.device.has_gpu = lambda: True\nstages.sys.executable = {str(command)!r}\n"
        f"stages.run_command('generate', print, GenerateConfig(prompts='p', model='m', output={str(tmp_path / 'out')!r}))"
    )
    parent = psutil.Popen([sys.executable, "-c", program])
    while not ((tmp_path / "child").is_file() and (tmp_path / "child").read_text().endswith("\n")):
        assert parent.poll() is None
        time.sleep(0.05)
    child = psutil.Process(int((tmp_path / "child").read_text()))
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + TIMEOUT
    while alive := child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            child.kill()
            break
        time.sleep(0.05)
    assert not alive

"""Stages of a longer command that run in separate processes: a model on the GPU, or ranks under torchrun."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpo_megatron import device
from mpo_megatron.config import GenerateConfig, ScoreConfig, to_dict
from mpo_megatron.config.sealed import seal_yaml
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.terminal.interruption import StageError
from mpo_megatron.train.launched import end_with_parent
from mpo_megatron.train.launcher import launch


def run_command(name: str, function: Callable[[Any], object], config: GenerateConfig | ScoreConfig) -> None:
    """Run a command that loads a model: on a CPU in this process; on a GPU in a child process, whose end frees the memory."""
    if not device.has_gpu():
        function(config)
        return
    path = save_config(Path(f"{config.output}.yaml"), config)
    command = [sys.executable, "-m", "mpo_megatron.cli", name, "--config", str(path)]
    with subprocess.Popen(command, preexec_fn=end_with_parent) as process:
        try:
            status = process.wait()
        except BaseException:  # a request to stop: the stage receives it too, and ends cleanly
            process.terminate()
            process.wait()
            raise
    if status:
        raise StageError(name, status)


def run_ranks(name: str, module: str, config: Path, num_ranks: int) -> None:
    """Run a module's ranks on this machine, with the configuration in a file."""
    status = launch(module, ["--config", str(config)], num_ranks=num_ranks, max_restarts=0)
    if status:
        raise StageError(name, status)


def save_config(path: Path, config: object) -> Path:
    """Write a stage's configuration to a file that its command reads."""
    replace_file(path, [seal_yaml(to_dict(config))])
    return path

"""Stages of a longer command that run in processes of their own: a command with a model on the GPU, or ranks under torchrun."""

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
    """Run a command that loads a model: in this process on a CPU; on a GPU in its own process, which then frees the memory."""
    if not device.has_gpu():
        function(config)
        return
    path = save_config(Path(f"{config.output}.yaml"), config)
    command = [sys.executable, "-m", "mpo_megatron.cli", name, "--config", str(path)]
    with subprocess.Popen(command, preexec_fn=end_with_parent) as process:
        try:
            status = process.wait()
        except BaseException:  # a request to stop: the stage gets it, too, and ends in good order
            process.terminate()
            process.wait()
            raise
    if status:
        raise StageError(name, status)


def run_ranks(name: str, module: str, config: Path, num_ranks: int) -> None:
    """Ranks of a module, on this machine, that take the configuration in a file."""
    status = launch(module, ["--config", str(config)], num_ranks=num_ranks, max_restarts=0)
    if status:
        raise StageError(name, status)


def save_config(path: Path, config: object) -> Path:
    """A stage's configuration as a file that its command takes."""
    replace_file(path, [seal_yaml(to_dict(config))])
    return path

"""Where a run is written down: files in its folder always; TensorBoard, Weights & Biases and MLflow when asked; the terminal.

    tracker.py    the interface, and the tables of samples that go through it
    files.py      metrics.jsonl and samples.jsonl
    services.py   TensorBoard, Weights & Biases, MLflow
    progress.py   the live view on a terminal, lines elsewhere
    facts.py      run.json: what ran, on what, with which code and data
    outcomes.py   every held-out group at every evaluation (data/outcomes.py has the format), and samples of them

Only the main process tracks. Nothing here reads environment variables but those named, so no secret gets into a log.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, LoggingConfig
from mpo_megatron.train.tracking.files import JsonlTracker
from mpo_megatron.train.tracking.progress import build_progress
from mpo_megatron.train.tracking.services import MlflowTracker, TensorBoardTracker, WandbTracker
from mpo_megatron.train.tracking.tracker import SampleTable, Tracker

__all__ = ["SampleTable", "Tracker", "build_trackers", "check_installed"]


def check_installed(logging: LoggingConfig) -> None:
    """Raise `ConfigError` if a tracker is asked for whose package is missing."""
    for field, wanted, module, package in (
        ("logging.tensorboard", logging.tensorboard, "tensorboard", "tensorboard"),
        ("logging.wandb_project", logging.wandb_project is not None, "wandb", "wandb"),
        ("logging.mlflow_experiment", logging.mlflow_experiment is not None, "mlflow", "mlflow-skinny"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise ConfigError(f"{field} is set, but {module} is not installed: pip install {package}, or leave {field} out.")


def build_trackers(
    logging: LoggingConfig,
    run_folder: Path,
    config: dict[str, Any],
    facts: dict[str, Any],
    *,
    start_step: int,
    total_steps: int,
) -> list[Tracker]:
    """The trackers a configuration asks for; the main process calls it.

    Args:
        facts: what `facts.record_start` wrote of this start
        start_step: steps done before; what trackers hold of later ones is written again
    """
    # The terminal's view is first, so that it is closed first: others print when they are closed.
    progress = build_progress(run_folder, total_steps, start_step, logging.seconds_between_lines)
    trackers: list[Tracker] = [progress, JsonlTracker(run_folder, start_step)]
    if logging.tensorboard:
        trackers.append(TensorBoardTracker(run_folder / "tensorboard", start_step, facts))
    if logging.wandb_project is not None:
        trackers.append(WandbTracker(run_folder, logging, config, facts))
    if logging.mlflow_experiment is not None:
        trackers.append(MlflowTracker(run_folder, logging, config, facts))
    return trackers

"""Where a run is recorded: always in files in its folder; optionally in TensorBoard, Weights & Biases, MLflow; the terminal.

    tracker.py    the interface, and tables of samples
    files.py      metrics.jsonl and samples.jsonl
    services.py   TensorBoard, Weights & Biases, MLflow
    progress.py   the live view on a terminal, lines elsewhere
    facts.py      run.json: what ran, on which machine, with which code and data
    outcomes.py   every held-out group at every evaluation (format: data/outcomes.py), and samples of them

Only the main process tracks. This package reads only the environment variables it names, so no secret gets into a log.
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
    """Raise `ConfigError` if the package of a configured tracker is missing."""
    for field, wanted, module, package in (
        ("logging.tensorboard", logging.tensorboard, "tensorboard", "tensorboard"),
        ("logging.wandb_project", logging.wandb_project is not None, "wandb", "wandb"),
        ("logging.mlflow_experiment", logging.mlflow_experiment is not None, "mlflow", "mlflow-skinny"),
    ):
        if wanted and importlib.util.find_spec(module) is None:
            raise ConfigError(f"{field} is set, but {module} is not installed: pip install {package}, or remove {field}.")


def build_trackers(
    logging: LoggingConfig,
    run_folder: Path,
    config: dict[str, Any],
    facts: dict[str, Any],
    *,
    start_step: int,
    total_steps: int,
) -> list[Tracker]:
    """The configured trackers; the main process calls it.

    Args:
        facts: facts of this start from `facts.record_start`
        start_step: completed steps; trackers overwrite later ones
    """
    # The terminal's view comes first, so that it is closed first: others print while closing.
    progress = build_progress(run_folder, total_steps, start_step, logging.seconds_between_lines)
    trackers: list[Tracker] = [progress, JsonlTracker(run_folder, start_step)]
    if logging.tensorboard:
        trackers.append(TensorBoardTracker(run_folder / "tensorboard", start_step, facts))
    if logging.wandb_project is not None:
        trackers.append(WandbTracker(run_folder, logging, config, facts))
    if logging.mlflow_experiment is not None:
        trackers.append(MlflowTracker(run_folder, logging, config, facts))
    return trackers

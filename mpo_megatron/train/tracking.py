"""Where metrics go: a JSONL file always, TensorBoard and Weights & Biases when asked, and a progress line on the terminal."""

from __future__ import annotations

import importlib.util
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mpo_megatron.config import ConfigError, LoggingConfig


class Tracker(Protocol):
    """Something that keeps metrics."""

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Keep the metrics of a step."""

    def close(self) -> None:
        """Write what is left."""


class JsonlTracker:
    """`metrics.jsonl`: one JSON object per step. A resumed run drops the lines it is about to write again."""

    def __init__(self, path: Path, start_step: int) -> None:
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= start_step] if start_step else []
        partial = path.with_name(path.name + ".partial")
        partial.write_text("".join(kept))
        os.replace(partial, path)
        self.file = path.open("a", buffering=1)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self.file.write(json.dumps({"step": step, **finite}) + "\n")

    def close(self) -> None:
        self.file.close()


class TensorBoardTracker:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path, start_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbTracker:
    """A Weights & Biases run; a resumed run continues its curves."""

    def __init__(self, run_folder: Path, logging: LoggingConfig, config: dict[str, Any]) -> None:
        import wandb

        name_file = run_folder / "wandb_run_id"
        self.run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_run,
            id=name_file.read_text().strip() if name_file.is_file() else None,
            resume="allow",
            dir=str(run_folder),
            config=config,
        )
        name_file.write_text(f"{self.run.id}\n")

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def close(self) -> None:
        self.run.finish()


class ProgressLine:
    """A live bar on a terminal; plain lines elsewhere."""

    def __init__(self, total_steps: int, start_step: int) -> None:
        self.console = Console(highlight=False)
        self.total_steps = total_steps
        columns = (
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"),
        )
        self.progress = Progress(*columns, console=self.console, disable=not self.console.is_terminal)
        self.task = self.progress.add_task("train", total=total_steps, completed=start_step, text="")
        self.progress.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        if "eval/loss" in metrics:
            shown = "  ".join(f"{name} {metrics[f'eval/{name}']:.4f}" for name in ("loss", "accuracy", "margin"))
            self.console.print(f"step {step}/{self.total_steps}  held-out: {shown}", soft_wrap=True)
            return
        text = f"skipped: none of its {metrics['skipped_groups']:.0f} groups carries a contrast"
        if "loss" in metrics:
            text = (
                f"loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}  margin {metrics['margin']:+.3f}  "
                f"lr {metrics['lr']:.2e}  grad {metrics['grad_norm']:.3f}  {metrics['tokens_per_second']:.0f} tok/s"
            )
        self.progress.update(self.task, completed=step, text=text)
        if not self.console.is_terminal:
            self.console.print(f"step {step}/{self.total_steps}  {text}", soft_wrap=True)

    def close(self) -> None:
        self.progress.stop()


def check_installed(logging: LoggingConfig) -> None:
    """Raise `ConfigError` if a tracker is asked for whose package is missing."""
    for field, wanted, package in (
        ("logging.tensorboard", logging.tensorboard, "tensorboard"),
        ("logging.wandb_project", logging.wandb_project is not None, "wandb"),
    ):
        if wanted and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{field} is set, but {package} is not installed: pip install {package}, or leave {field} out.")


def build_trackers(
    logging: LoggingConfig, run_folder: Path, config: dict[str, Any], *, start_step: int, total_steps: int
) -> list[Tracker]:
    """The trackers a configuration asks for; the main process calls it."""
    trackers: list[Tracker] = [JsonlTracker(run_folder / "metrics.jsonl", start_step)]
    if logging.tensorboard:
        trackers.append(TensorBoardTracker(run_folder / "tensorboard", start_step))
    if logging.wandb_project is not None:
        trackers.append(WandbTracker(run_folder, logging, config))
    trackers.append(ProgressLine(total_steps, start_step))
    return trackers


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    # A killed run may leave half a line at the end.
    return [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]

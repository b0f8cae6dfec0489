"""TensorBoard, Weights & Biases and MLflow: the same metrics, samples and facts, in each service's form.

A resumed run continues its curves. TensorBoard hides repeated steps (`purge_step`). Weights & Biases and MLflow keep them, so the
run's id is stored in its folder, and steps that the service already has are not sent again.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mpo_megatron.config import ConfigError, LoggingConfig
from mpo_megatron.files.digests import seal, unseal
from mpo_megatron.terminal.visible import visible
from mpo_megatron.train.tracking.tracker import SampleTable

MLFLOW_PARAMS = 100
"""MLflow's limit of parameters per call."""
MLFLOW_PARAM_LENGTH = 6000
"""MLflow's limit of a parameter's length."""


class TensorBoardTracker:
    """Event files for TensorBoard; samples and facts as text."""

    def __init__(self, folder: Path, start_step: int, facts: Mapping[str, Any]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)
        self.writer.add_text("run", "```json\n" + json.dumps(facts, indent=2) + "\n```", start_step)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def log_samples(self, step: int, samples: SampleTable) -> None:
        self.writer.add_text("samples", markdown_table(samples), step)

    def close(self) -> None:
        self.writer.close()


def write_id(path: Path, run_id: str) -> None:
    """Store the id that a service gave a run."""
    path.write_bytes(seal({"id": run_id}))


def read_id(path: Path) -> str:
    """The id stored by `write_id`.

    Raises:
        DamagedError: the file differs from what was written.
    """
    return str(unseal(path, "remove it to start a new run at the service")["id"])


class WandbTracker:
    """A Weights & Biases run; WANDB_MODE=offline keeps it in the run's folder."""

    def __init__(self, run_folder: Path, logging: LoggingConfig, config: dict[str, Any], facts: dict[str, Any]) -> None:
        import wandb

        self.table = wandb.Table
        name_file = run_folder / "wandb_run_id"
        self.run = wandb.init(
            project=logging.wandb_project,
            name=logging.wandb_run,
            id=read_id(name_file) if name_file.is_file() else None,
            resume="allow",
            dir=str(run_folder),
            config=config,
        )
        # A restart's facts differ from the first start's: another machine, perhaps other packages.
        self.run.config.update({"run": facts}, allow_val_change=True)
        write_id(name_file, self.run.id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        self.run.log(dict(metrics), step=step)

    def log_samples(self, step: int, samples: SampleTable) -> None:
        rows = [list(row) for row in samples.rows]
        self.run.log({"samples": self.table(columns=list(samples.columns), data=rows)}, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowTracker:
    """An MLflow run, on a server or in a SQLite file; samples are table artifacts.

    Losing the server does not end the training: after one message nothing more is sent; `metrics.jsonl` has everything.
    """

    def __init__(self, run_folder: Path, logging: LoggingConfig, config: dict[str, Any], facts: dict[str, Any]) -> None:
        """Continue the run whose id is in the folder, or create one.

        Raises:
            ConfigError: MLflow refuses to create the run.
        """
        from mlflow.exceptions import MlflowException
        from mlflow.tracking import MlflowClient

        self.failure = MlflowException
        address = logging.mlflow_uri or os.environ.get("MLFLOW_TRACKING_URI")
        local = f"sqlite:///{run_folder.absolute() / 'mlflow.db'}"
        self.client = MlflowClient(tracking_uri=address or local)
        self.broken, self.sent = False, {"": -1, "eval/": -1}
        id_file = run_folder / "mlflow_run_id"
        if id_file.is_file():
            self.run_id = read_id(id_file)
            self._send(lambda: self._go_on(facts))
            return
        try:
            self.run_id = self._create(str(logging.mlflow_experiment), run_folder, local=address is None)
            self._log_params(config)
            self._set_tags(facts)
        except MlflowException as error:
            raise ConfigError(
                f"logging.mlflow_experiment = {logging.mlflow_experiment}; MLflow cannot create this run ({error}); start its "
                "server, fix logging.mlflow_uri, or remove both."
            ) from error
        write_id(id_file, self.run_id)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        kind = "eval/" if any(name.startswith("eval/") for name in metrics) else ""
        if step > self.sent[kind]:
            now = int(1000 * time.time())
            values = [Metric(name, value, now, step) for name, value in metrics.items()]
            self._send(lambda: self.client.log_batch(self.run_id, metrics=values))

    def log_samples(self, step: int, samples: SampleTable) -> None:
        table = {"columns": list(samples.columns), "data": [list(row) for row in samples.rows]}
        self._send(lambda: self.client.log_dict(self.run_id, table, f"samples/step_{step:08d}.json"))

    def close(self) -> None:
        self._send(lambda: self.client.set_terminated(self.run_id))

    def _create(self, experiment: str, run_folder: Path, *, local: bool) -> str:
        found = self.client.get_experiment_by_name(experiment)
        if found is not None:
            experiment_id = found.experiment_id
        else:
            # For our own SQLite file; a server decides itself.
            artifacts = (run_folder.absolute() / "mlflow-artifacts").as_uri() if local else None
            experiment_id = self.client.create_experiment(experiment, artifact_location=artifacts)
        run_id: str = self.client.create_run(experiment_id, run_name=run_folder.name).info.run_id
        return run_id

    def _go_on(self, facts: dict[str, Any]) -> None:
        self.client.update_run(self.run_id, status="RUNNING")
        self._set_tags(facts)
        self.sent = {"": self._last_step("lr"), "eval/": self._last_step("eval/loss")}

    def _set_tags(self, facts: dict[str, Any]) -> None:
        for name, value in flatten(facts).items():
            self.client.set_tag(self.run_id, f"run.{name}", value[:MLFLOW_PARAM_LENGTH])

    def _log_params(self, config: dict[str, Any]) -> None:
        from mlflow.entities import Param

        params = [Param(name, value[:MLFLOW_PARAM_LENGTH]) for name, value in flatten(config).items()]
        for some in itertools.batched(params, MLFLOW_PARAMS):
            self.client.log_batch(self.run_id, params=some)

    def _last_step(self, name: str) -> int:
        """The last step of a metric in MLflow; −1 without one."""
        return max((metric.step for metric in self.client.get_metric_history(self.run_id, name)), default=-1)

    def _send(self, send: Callable[[], object]) -> None:
        """Send something unless the server was lost; if it is lost now, report it once."""
        try:
            if not self.broken:
                send()
        except self.failure as error:
            self.broken = True
            print(f"MLflow: {visible(error)}; this run sends nothing more to it; metrics.jsonl has everything.", flush=True)


def markdown_table(samples: SampleTable) -> str:
    """The samples as Markdown, with texts escaped so that they cannot break the table."""

    def cell(value: object) -> str:
        if value is None:
            return ""
        text = f"{value:.3f}" if isinstance(value, float) else str(value)
        return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ⏎ ")

    lines = [samples.columns, ("---",) * len(samples.columns), *samples.rows]
    return "\n".join("| " + " | ".join(map(cell, line)) + " |" for line in lines)


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested dictionaries as one flat dictionary, with dotted names and text values."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, str) else json.dumps(value)
    return flat

"""Shell scripts: torchrun on your own machines, and Slurm."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mpo_megatron.config import (
    FaultConfig,
    GenerateConfig,
    JobConfig,
    ScoreConfig,
    SlurmArray,
    SlurmJob,
    TorchrunJob,
    load_yaml,
    require,
)
from mpo_megatron.launch.layout import describe, load_run

RANK_MODULE = "mpo_megatron.train"
"""The module that every rank runs."""

CPU_RANKS = {"CUDA_VISIBLE_DEVICES": ""}
"""A job without GPUs must not see the machine's GPUs: others may use them."""


def torchrun_script(job: TorchrunJob) -> str:
    """A script to start on every machine."""
    return _render_run("torchrun.sh.j2", job, script=job.output or "train.sh")


def slurm_script(job: SlurmJob) -> str:
    """An sbatch script with one Slurm task per rank."""
    return _render_run("slurm.sh.j2", job)


def slurm_array_script(job: SlurmArray) -> str:
    """An sbatch script whose array tasks each generate, or score, one shard.

    Raises:
        ConfigError: the configuration of `mpo generate` or `mpo score` is refused.
    """
    command, path = ("score", job.score) if job.generate is None else ("generate", job.generate)
    assert path is not None
    require(Path(path).is_file(), f"{command} = {path}; no such file; write the options of `mpo {command}` there.")
    kind: type[GenerateConfig | ScoreConfig] = GenerateConfig if command == "generate" else ScoreConfig
    load_yaml(kind, path)
    return _render(
        "slurm_array.sh.j2",
        job,
        on_cpus=job.gpus_per_task == 0,
        name=job.name or f"mpo-{command}",
        command=command,
        config=path,
        requeue_code=FaultConfig().requeue_code,
    )


def preamble(setup: str, environment: dict[str, str]) -> str:
    """Shell lines before a job's command."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*setup.strip().splitlines(), *exports])


def _render_run(template: str, job: JobConfig, **values: Any) -> str:
    config = load_run(job)
    return _render(
        template,
        job,
        on_cpus=job.gpus_per_node == 0,
        layout=describe(job, config),
        train=job.train,
        module=RANK_MODULE,
        requeue_code=config.faults.requeue_code,
        **values,
    )


def _render(template: str, job: JobConfig | SlurmArray, *, on_cpus: bool, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("mpo_megatron.launch"), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = shlex.quote
    environment.filters["escape_quoted"] = lambda text: re.sub(r'(["\\$`])', r"\\\1", text)  # inside double quotes
    variables = (CPU_RANKS if on_cpus else {}) | job.environment
    return environment.get_template(template).render(job=job, preamble=preamble(job.setup, variables), **values)

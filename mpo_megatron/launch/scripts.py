"""Shell scripts: torchrun on machines of one's own, and Slurm."""

from __future__ import annotations

import shlex
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from mpo_megatron.config import SlurmArray, SlurmJob, TorchrunJob
from mpo_megatron.launch.layout import describe

MODULE = "mpo_megatron.train"
"""What every rank runs."""
REQUEUE_CODE = 75
"""Exit code of a run that saved because it was asked to stop (sysexits' EX_TEMPFAIL: try again)."""
CPU_RANKS = {"CUDA_VISIBLE_DEVICES": ""}
"""A job that asks for no GPU must not see one: it would not be its own."""


def torchrun_script(job: TorchrunJob) -> str:
    """A script to start on every machine."""
    script = job.output or "train.sh"
    return _render("torchrun.sh.j2", job=job, layout=describe(job), train=job.train, script=script)


def slurm_script(job: SlurmJob) -> str:
    """An sbatch script with one Slurm task a rank."""
    return _render("slurm.sh.j2", job=job, layout=describe(job), train=job.train)


def slurm_array_script(job: SlurmArray) -> str:
    """An sbatch script whose array tasks generate one shard each."""
    return _render("slurm_array.sh.j2", job=job, generate=job.generate)


def preamble(setup: str, environment: dict[str, str]) -> str:
    """Shell lines that come before a job's command."""
    exports = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    return "\n".join([*setup.strip().splitlines(), *exports])


def _render(template: str, job: Any, **values: Any) -> str:
    environment = Environment(
        loader=PackageLoader("mpo_megatron.launch"), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    environment.filters["quote"] = shlex.quote
    on_cpus = getattr(job, "gpus_per_node", getattr(job, "gpus_per_task", None)) == 0
    return environment.get_template(template).render(
        job=job,
        module=MODULE,
        requeue_code=REQUEUE_CODE,
        preamble=preamble(job.setup, (CPU_RANKS if on_cpus else {}) | job.environment),
        **values,
    )

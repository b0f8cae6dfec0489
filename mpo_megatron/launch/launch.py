"""`mpo launch`: write a job, and submit it."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from mpo_megatron.config import (
    ConfigError,
    JobConfig,
    KubernetesJob,
    SkypilotJob,
    SlurmArray,
    SlurmJob,
    TorchrunJob,
    check_writable,
    require,
)
from mpo_megatron.config.checks import check_length
from mpo_megatron.launch.manifests import kubernetes_manifest, skypilot_task
from mpo_megatron.launch.scripts import slurm_array_script, slurm_script, torchrun_script

Job = JobConfig | SlurmArray

TARGETS: dict[str, type[Job]] = {
    "torchrun": TorchrunJob,
    "slurm": SlurmJob,
    "slurm-array": SlurmArray,
    "kubernetes": KubernetesJob,
    "skypilot": SkypilotJob,
}
"""Subcommands of `mpo launch`, and their options."""


def launch(job: Job) -> int:
    """Render the job, write or print it, and submit it unless it is a dry run. Returns the exit code.

    Raises:
        ConfigError: the layout does not fit the machines, or the submitting program is missing.
    """
    if job.output is not None:
        check_length(Path(job.output), "output")
        check_writable(Path(job.output).parent, "output")
        require(not Path(job.output).is_dir(), f"output = {job.output}; it is a folder; name a file for the job.")
    if isinstance(job, SlurmJob | SlurmArray):
        (check_length if job.dry_run else check_writable)(Path(job.logs), "logs")
    text, submit = render(job)
    if job.output is not None:
        Path(job.output).parent.mkdir(parents=True, exist_ok=True)
        Path(job.output).write_text(text)
        print(f"wrote {job.output}", file=sys.stderr)
    else:
        print(text, end="")
    if job.dry_run or submit is None:
        if job.output is not None:
            words = submit or ["bash"]
            print(f"next: {shlex.join([*words, job.output])}{'' if submit else ', on every machine'}", file=sys.stderr)
        return 0
    if shutil.which(submit[0]) is None:
        raise ConfigError(
            f"{submit[0]}, which submits the job, is not installed here; add --dry_run true, and submit the job elsewhere."
        )
    if isinstance(job, SlurmJob | SlurmArray):
        Path(job.logs).mkdir(parents=True, exist_ok=True)
    if job.output is not None:
        return subprocess.run([*submit, job.output], check=False).returncode
    with tempfile.NamedTemporaryFile("w", prefix="mpo-", suffix=".job") as file:
        file.write(text)
        file.flush()
        return subprocess.run([*submit, file.name], check=False).returncode


def render(job: Job) -> tuple[str, list[str] | None]:
    """The job's text, and the command that submits a file with it; None for jobs that users start themselves."""
    match job:
        case SlurmJob():
            return slurm_script(job), ["sbatch"]
        case SlurmArray():
            return slurm_array_script(job), ["sbatch"]
        case KubernetesJob():
            return kubernetes_manifest(job), ["kubectl", "apply", "-f"]
        case SkypilotJob():
            return skypilot_task(job), ["sky", "jobs", "launch"]
        case TorchrunJob():
            return torchrun_script(job), None
    raise TypeError(type(job))

"""Options of `mpo launch <target>`: one dataclass per target, with common options of a job."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section

ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
JOB_NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
SLURM_WORD = re.compile(r"[\w./:@%+,=-]+")
MOUNT = re.compile(r"[^\n:]+:[^\n]+")
SLURM_TIME = re.compile(r"(\d+-)?\d+(:\d{1,2}){0,2}")


@dataclass(frozen=True, kw_only=True)
class JobConfig(Section):
    """Options of a training job, common to all targets."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = ("train", "nodes", "gpus_per_node", "output", "setup", "environment", "dry_run")

    train: str
    """YAML file of `mpo train`; the job runs it unchanged, after checking its layout against the nodes."""
    output: str | None = None
    """File to write the job to; by default it is printed."""
    name: str = "mpo"
    """Name of the job: lower-case letters, digits and hyphens."""
    nodes: int = 1
    """Machines."""
    gpus_per_node: int = 8
    """GPUs per machine; 0 for a job on CPUs."""
    ranks_per_node: int | None = None
    """Processes per machine; by default one per GPU."""
    setup: str = ""
    """Shell lines to run first on every machine: `module load …`, `source …/bin/activate`."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the ranks, for example NCCL's; docs/launching.md explains which matter."""
    dry_run: bool = False
    """Write or print the job without submitting it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.nodes >= 1, f"nodes = {self.nodes}; it must be at least 1.")
        require(self.gpus_per_node >= 0, f"gpus_per_node = {self.gpus_per_node}; it must be 0 (CPUs only) or more.")
        require(
            self.gpus_per_node > 0 or self.ranks_per_node is not None,
            "gpus_per_node = 0 leaves no rank to start; set ranks_per_node for a job on CPUs.",
        )
        require(self.ranks_per_node is None or self.ranks_per_node >= 1, f"ranks_per_node = {self.ranks_per_node}; at least 1.")
        require(
            JOB_NAME.fullmatch(self.name) is not None and len(self.name) <= 40,
            f"name = {self.name!r}; use at most 40 lower-case letters, digits and hyphens, and no hyphen at either end.",
        )
        for name in self.environment:
            require(ENVIRONMENT_NAME.fullmatch(name) is not None, f"environment: {name!r} cannot be a variable's name.")

    @property
    def ranks(self) -> int:
        """Processes on each machine."""
        return self.ranks_per_node or self.gpus_per_node


@dataclass(frozen=True, kw_only=True)
class TorchrunJob(JobConfig):
    """`mpo launch torchrun`: a shell script to start on every machine by hand, or by any scheduler."""

    rendezvous: Literal["static", "c10d"] = "c10d"
    """`static`: every machine gets its number (NODE_RANK); `c10d`: machines rendezvous at the first one, and may restart."""
    max_restarts: int = 3
    """Maximum restarts by torchrun after failures; each time the run resumes from its newest checkpoint."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.max_restarts >= 0, f"max_restarts = {self.max_restarts}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class SlurmJob(JobConfig):
    """`mpo launch slurm`: an sbatch script that saves before its time limit and requeues itself."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (*JobConfig.MAIN_OPTIONS, "time", "partition", "container")

    time: str = "24:00:00"
    """Time limit, in Slurm's format."""
    partition: str | None = None
    """Partition to submit to."""
    account: str | None = None
    """Account to charge."""
    qos: str | None = None
    """Quality of service."""
    cpus_per_rank: int | None = None
    """CPU cores per rank."""
    warn_seconds: int = 300
    """Seconds before the time limit at which the ranks receive SIGUSR1; must exceed a step plus a save."""
    max_requeues: int = 20
    """Maximum times that the job requeues itself after a clean stop."""
    logs: str = "logs"
    """Folder of the job's logs: one file per job and one per rank."""
    container: str | None = None
    """Container image for the ranks; by default they run without a container."""
    container_runtime: Literal["pyxis", "apptainer"] = "pyxis"
    """Runtime of the container image."""
    mounts: list[str] = field(default_factory=list)
    """Folders visible in the container, `outside:inside`."""
    sbatch: list[str] = field(default_factory=list)
    """Further sbatch options, for example `--exclusive` or `--constraint=h100`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(SLURM_TIME.fullmatch(self.time) is not None, f"time = {self.time!r}; write it like 24:00:00 or 2-12:00:00.")
        require(self.warn_seconds >= 1, f"warn_seconds = {self.warn_seconds}; it must be at least 1.")
        require(self.max_requeues >= 0, f"max_requeues = {self.max_requeues}; it must be 0 or more.")
        require(
            self.cpus_per_rank is None or self.cpus_per_rank >= 1,
            f"cpus_per_rank = {self.cpus_per_rank}; it must be at least 1, or absent.",
        )
        require(self.container != "", "container is empty; name an image, or remove it.")
        require(
            not self.mounts or self.container is not None,
            f"mounts = {self.mounts}, but there is no container; set container to an image, or remove mounts.",
        )
        for mount in self.mounts:
            require(
                MOUNT.fullmatch(mount) is not None, f"mounts: {mount!r}; write outside:inside, such as /data:/data, on one line."
            )
        _check_directives(self)


@dataclass(frozen=True, kw_only=True)
class SlurmArray(Section):
    """`mpo launch slurm-array`: responses for many prompts, or scores for many groups; each array task handles one shard."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (
        "generate",
        "score",
        "tasks",
        "gpus_per_task",
        "time",
        "partition",
        "output",
        "setup",
        "dry_run",
    )

    generate: str | None = None
    """YAML file of `mpo generate`; give this or `score`."""
    score: str | None = None
    """YAML file of `mpo score`."""
    output: str | None = None
    """File to write the job to; by default it is printed."""
    name: str | None = None
    """Name of the job; by default mpo-generate or mpo-score."""
    tasks: int = 8
    """Number of array tasks, which is the number of shards."""
    gpus_per_task: int = 1
    """GPUs per task (the engine's tensor-parallel size); 0 for CPUs."""
    time: str = "04:00:00"
    """Time limit of a task, in Slurm's format; a task that reaches it is requeued and resumes."""
    partition: str | None = None
    """Partition to submit to."""
    account: str | None = None
    """Account to charge."""
    max_requeues: int = 20
    """Maximum times that a task requeues itself."""
    logs: str = "logs"
    """Folder of the tasks' logs."""
    setup: str = ""
    """Shell lines to run first in every task."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the tasks."""
    sbatch: list[str] = field(default_factory=list)
    """Further sbatch options."""
    dry_run: bool = False
    """Write or print the job without submitting it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            (self.generate is None) != (self.score is None),
            "give either generate, a YAML file of `mpo generate`, or score, one of `mpo score`.",
        )
        require(self.tasks >= 1, f"tasks = {self.tasks}; it must be at least 1.")
        require(self.gpus_per_task >= 0, f"gpus_per_task = {self.gpus_per_task}; it must be 0 (CPUs only) or more.")
        require(self.max_requeues >= 0, f"max_requeues = {self.max_requeues}; it must be 0 or more.")
        _check_directives(self)
        require(SLURM_TIME.fullmatch(self.time) is not None, f"time = {self.time!r}; write it like 24:00:00 or 2-12:00:00.")
        for name in self.environment:
            require(ENVIRONMENT_NAME.fullmatch(name) is not None, f"environment: {name!r} cannot be a variable's name.")


def _check_directives(job: SlurmJob | SlurmArray) -> None:
    """Check the values in #SBATCH lines, which no shell reads, so they cannot be quoted."""
    for name in ("name", "partition", "account", "qos", "logs"):
        value = getattr(job, name, None)
        require(
            value is None or SLURM_WORD.fullmatch(value) is not None,
            f"{name} = {value!r}; in a Slurm job it must not contain spaces, quotes or $.",
        )
    for option in job.sbatch:
        require(
            re.fullmatch(r"--\S[^\n]*", option) is not None,
            f"sbatch: {option!r} must start with --, like --exclusive, and be one line.",
        )


@dataclass(frozen=True, kw_only=True)
class KubernetesJob(JobConfig):
    """`mpo launch kubernetes`: a PyTorchJob (Kubeflow trainer) or a JobSet, together with the run's configuration."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (*JobConfig.MAIN_OPTIONS, "image", "kind", "volumes")

    image: str
    """Container image with this package installed."""
    kind: Literal["pytorchjob", "jobset"] = "pytorchjob"
    """The cluster's controller."""
    namespace: str = "default"
    """Namespace of the job."""
    volumes: dict[str, str] = field(default_factory=dict)
    """Persistent volume claims and their mount points, `claim: /path`; the run's folder must be on one."""
    shared_memory: str = "64Gi"
    """Size of /dev/shm."""
    max_restarts: int = 20
    """Maximum restarts of the job; each time the run resumes from its newest checkpoint."""
    resources: dict[str, str] = field(default_factory=dict)
    """Further resource limits per pod, for example `rdma/ib: "8"`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.image != "", "image is empty; name a container image with this package.")
        require(self.max_restarts >= 0, f"max_restarts = {self.max_restarts}; it must be 0 or more.")


@dataclass(frozen=True, kw_only=True)
class SkypilotJob(JobConfig):
    """`mpo launch skypilot`: a SkyPilot task, which finds machines in a cloud and recovers from their loss."""

    MAIN_OPTIONS: ClassVar[tuple[str, ...]] = (*JobConfig.MAIN_OPTIONS, "accelerators", "image", "mounts")

    accelerators: str
    """GPU type that SkyPilot requests, such as H100; gpus_per_node sets the number."""
    image: str | None = None
    """Container image, `docker:…`; by default SkyPilot's own, in which `setup` must install the package."""
    mounts: dict[str, str] = field(default_factory=dict)
    """`file_mounts`: path on the machine → bucket or local folder; the run's folder must be on a bucket."""
    spot: bool = False
    """Use spot machines, which may be reclaimed; the run resumes on others."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.accelerators != "", "accelerators is empty; name a GPU type, such as H100.")
        require(self.image != "", "image is empty; name one as docker:…, or remove it.")

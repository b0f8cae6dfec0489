"""Checks that a run's layout fits the machines of a job."""

from __future__ import annotations

import posixpath
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from mpo_megatron.config import ConfigError, JobConfig, TrainConfig, load_yaml, require, validate_unused
from mpo_megatron.config.parallel import check_ranks


def load_run(job: JobConfig) -> TrainConfig:
    """The run's configuration, with its layout checked against the job's machines.

    Raises:
        ConfigError: the configuration is refused, its model-parallel ranks do not divide the job's, or a tensor-parallel group
            would span machines.
    """
    require(Path(job.train).is_file(), f"train = {job.train}; no such file; write the options of `mpo train` there.")
    try:
        config = load_yaml(TrainConfig, job.train)
        validate_unused(config)
    except ConfigError as error:
        raise ConfigError(f"train = {error}") from error
    check_ranks(config.parallel, job.nodes * job.ranks)
    require(
        job.ranks % config.parallel.tensor == 0,
        f"parallel.tensor = {config.parallel.tensor} in {job.train} does not divide the {job.ranks} ranks of a machine: "
        f"tensor-parallel ranks must share a machine; choose a divisor of {job.ranks}.",
    )
    return config


def require_kept(job: JobConfig, config: TrainConfig, option: str, mounts: Iterable[str]) -> None:
    """Check that the run's folder survives the job.

    Args:
        option: the job's option that mounts storage
        mounts: mount points
    Raises:
        ConfigError: the folder is on the machine's own disk.
    """
    output, places = PurePosixPath(posixpath.normpath(config.output)), sorted(mounts)
    where = f"below {' or '.join(places)}" if places else "where it is mounted"
    require(
        any(output.is_relative_to(place) for place in places),
        f"output = {config.output} in {job.train} is in the job's own file system, which disappears with the job; mount storage "
        f"with --{option}, and set output to an absolute path {where}.",
    )


def describe(job: JobConfig, config: TrainConfig) -> str:
    """The layout as text."""
    parallel, world_size = config.parallel, job.nodes * job.ranks
    sizes = {
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "context": parallel.context,
        "data": world_size // (parallel.tensor * parallel.pipeline * parallel.context),
    }
    words = " × ".join(f"{name} {size}" for name, size in sizes.items())
    return f"{world_size} ranks on {job.nodes} machine{'s' if job.nodes > 1 else ''} of {job.ranks}: {words}"

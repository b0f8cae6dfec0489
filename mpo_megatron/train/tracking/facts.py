"""`run.json`: what ran, on which machine, with which code and data; one entry for the run, one per start.

Environment variables are read by name only, and from git only the revision: addresses and variables may contain secrets.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import socket
import subprocess
from pathlib import Path
from typing import Any

import psutil
import torch

import mpo_megatron
from mpo_megatron import device
from mpo_megatron.config import TrainConfig, to_dict
from mpo_megatron.data.store import PreparedGroups
from mpo_megatron.files.atomic import replace_file
from mpo_megatron.files.digests import DamagedError, seal, unseal
from mpo_megatron.terminal.visible import visible

RUN_FILE = "run.json"
FORMAT_VERSION = 1
PACKAGES = (
    *("mpo-megatron", "torch", "megatron-core", "transformer-engine", "flash-attn", "triton", "transformers", "tokenizers"),
    *("sentencepiece", "safetensors", "datasets", "numpy", "pyarrow", "vllm"),
)
"""Packages whose version may change a run's numbers; packages that are not installed are omitted."""
JOB_VARIABLES = ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
"""Environment variables that identify the job."""


def record_start(
    folder: Path,
    config: TrainConfig,
    *,
    step: int,
    total_steps: int,
    train: PreparedGroups,
    held_out: PreparedGroups | None,
    model_digest: str,
    reference_digest: str,
    data_parallel: int,
) -> dict[str, Any]:
    """Add this start to `<folder>/run.json`, and describe the run there; returns the facts of this start.

    Args:
        step: completed steps
        data_parallel: number of model replicas
    """
    facts = {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "step": step,
        "git": git_revision(Path(mpo_megatron.__file__).parent),
        "packages": package_versions(),
        "layout": layout(config, data_parallel),
        "hardware": hardware(),
        "job": {name: os.environ[name] for name in JOB_VARIABLES if name in os.environ},
        "digests": {
            "model": model_digest,
            "reference": reference_digest,
            "tokenizer": train.info.tokenizer_digest,
            "train": train.info.data_digest,
            "eval": None if held_out is None else held_out.info.data_digest,
        },
    }
    path = folder / RUN_FILE
    run = {
        "format_version": FORMAT_VERSION,
        "total_steps": total_steps,
        "config": to_dict(config),
        "starts": [*(earlier_starts(path) if step else []), facts],
    }
    replace_file(path, [seal(run)])
    return facts


def earlier_starts(path: Path) -> list[dict[str, Any]]:
    """Facts about the run's earlier starts; a damaged file must not prevent a run from continuing."""
    if not path.is_file():
        return []
    try:
        starts: list[dict[str, Any]] = unseal(path, "facts about earlier starts of this run are lost")["starts"]
    except DamagedError as error:
        print(visible(error), flush=True)
        return []
    return starts


def git_revision(folder: Path) -> dict[str, Any] | None:
    """{revision, modified} of the repository that tracks a folder's files; None without one, or without git."""

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    # An installed package may be inside an unrelated repository, which does not track its files.
    if not git("ls-files", "--error-unmatch", "__init__.py"):
        return None
    revision, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no", ".")
    return None if revision is None else {"revision": revision, "modified": bool(changes)}


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages used for computing."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    if torch.version.cuda:
        versions["cuda"] = torch.version.cuda
    return versions


def layout(config: TrainConfig, data_parallel: int) -> dict[str, int]:
    """How the run is partitioned over ranks."""
    parallel = config.parallel
    return {
        "world_size": parallel.tensor * parallel.pipeline * parallel.context * data_parallel,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "virtual_pipeline": parallel.virtual_pipeline,
        "context": parallel.context,
        "expert": parallel.expert,
        "data": data_parallel,
    }


def hardware() -> dict[str, Any]:
    """The main process's machine."""
    return {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "gpu": device.gpu_name(),
        "gpus_per_host": torch.cuda.device_count(),
        "cpu_cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }

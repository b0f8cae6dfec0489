"""The machine: GPUs, driver, memory, disks, and compilers."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from mpo_megatron.device import cpu_has_bf16
from mpo_megatron.stack.checks import slow_bf16
from mpo_megatron.stack.cuda import (
    OLDEST_DRIVER,
    driver_cuda,
    driver_version,
    find_compiler,
    find_nvcc,
    gpu_files,
    torch_cuda,
    unsupported_gpus,
    unusable_gpus,
)
from mpo_megatron.stack.problem import Problem

SHARED_MEMORY_GIB = 1.0
"""Minimum /dev/shm with GPUs: NCCL uses up to some tens of MB per pair of GPUs; Docker's default is 64 MB in total."""

SPACE_GIB = 20.0
"""Report less free disk space than this: a checkpoint of a 1B model with optimizer states takes 16 GB."""


def describe_machine(folder: Path, precision: str) -> tuple[dict[str, Any], list[Problem]]:
    """(facts, problems).

    Args:
        folder: folder on the disk that a run would write to
        precision: its model.precision
    """
    cuda = driver_cuda()
    facts: dict[str, Any] = {
        "host": socket.gethostname(),
        "system": f"{platform.system()} {platform.release()} {platform.machine()}, {' '.join(platform.libc_ver())}",
        "python": platform.python_version(),
        "cpu_cores": os.cpu_count(),
        "cpu_bf16": cpu_has_bf16(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "gpus": [_gpu(index) for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else [],
        "gpu_files": gpu_files(),
        "driver": driver_version(),
        "driver_cuda": cuda if isinstance(cuda, str) else f"{cuda[0]}.{cuda[1]}",
        "nccl": _nccl(),
        "cudnn": _cudnn(),
        "nvcc": find_nvcc(),
        "compiler": find_compiler(),
        "shared_memory_gib": _free_gib(Path("/dev/shm")),
        "disks_gib": {str(path): _free_gib(path) for path in dict.fromkeys((folder, Path(tempfile.gettempdir()), _hub_cache()))},
    }
    slow = slow_bf16(precision)
    return facts, [*_gpu_problems(facts), *_space_problems(facts), *([] if slow is None else [slow])]


def _gpu(index: int) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "memory_gib": round(properties.total_memory / 2**30, 1),
    }


def _nccl() -> str | None:
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()[:3]))


def _cudnn() -> str | None:
    """Version of cuDNN; its number has two digits each for minor and patch."""
    if torch.version.cuda is None:
        return None
    try:
        number = torch.backends.cudnn.version()
    except RuntimeError as error:  # another cuDNN was found before torch's
        return " ".join(str(error).split())
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _hub_cache() -> Path:
    """Cache folder of Hugging Face's libraries."""
    home = os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface")
    return Path(os.environ.get("HF_HUB_CACHE", Path(home) / "hub"))


def _free_gib(path: Path) -> float | None:
    """Free space on the disk of a path, which need not exist, in GiB."""
    for folder in (path, *path.absolute().parents):
        if folder.is_dir():
            return round(shutil.disk_usage(folder).free / 2**30, 1)
    return None


def _gpu_problems(facts: dict[str, Any]) -> list[Problem]:
    found = [problem for problem in (unusable_gpus(), unsupported_gpus()) if problem is not None]
    if facts["driver"] and not facts["gpu_files"]:
        found.append(
            Problem(
                what=f"an NVIDIA driver ({facts['driver']}) is loaded, but this process sees no GPU",
                cure="give the container access to its GPUs: docker run --gpus all",
                severity="warning",
            )
        )
    if not facts["gpu_files"]:
        return found
    cuda = torch_cuda()
    oldest = OLDEST_DRIVER.get(cuda[0]) if cuda else None
    if facts["driver"] and oldest and _numbers(facts["driver"]) < _numbers(oldest) and not found:
        found.append(
            Problem(
                what=f"driver {facts['driver']} is older than {oldest}, the oldest that CUDA {cuda[0] if cuda else ''} supports",
                cure=f"update the driver to {oldest} or newer",
                severity="warning",  # a compatibility package may be installed
            )
        )
    if facts["compiler"] is None:
        found.append(Problem(what="there is no C compiler, but Triton needs one (torch.compile)", cure="apt install gcc"))
    elif not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        package = f"python{sysconfig.get_python_version()}-dev"
        found.append(Problem(what="there is no Python.h, but Triton needs it (torch.compile)", cure=f"apt install {package}"))
    return found


def _space_problems(facts: dict[str, Any]) -> list[Problem]:
    found = []
    shared = facts["shared_memory_gib"]
    if facts["gpu_files"] and shared is not None and shared < SHARED_MEMORY_GIB:
        found.append(
            Problem(
                what=f"/dev/shm has {shared} GiB free; NCCL may need more between GPUs",
                cure="docker run --ipc host, or --shm-size 8g",
                severity="warning",
            )
        )
    for path, free in facts["disks_gib"].items():
        if free is not None and free < SPACE_GIB:
            found.append(Problem(what=f"{path} has {free} GiB free", cure="free space, or use another disk", severity="warning"))
    return found


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))

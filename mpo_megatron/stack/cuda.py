"""The NVIDIA driver, torch's CUDA, and the GPUs: whether torch can compute on them."""

from __future__ import annotations

import ctypes
import glob
import os
import re
import shutil
import sysconfig
from pathlib import Path

import torch

from mpo_megatron.stack.problem import Problem

OLDEST_DRIVER = {11: "450.80", 12: "525.60", 13: "580.65"}
"""Oldest Linux driver for each major version of CUDA (CUDA release notes, minor version compatibility)."""

HIDDEN = ("", "-1", "NoDevFiles")
"""Values of CUDA_VISIBLE_DEVICES that hide every GPU; the last one is set by Slurm for jobs without GPUs."""

ON_CPU = "to compute on the CPU anyway, set CUDA_VISIBLE_DEVICES to nothing: CUDA_VISIBLE_DEVICES= mpo …"

SYSTEM_NOT_READY = "802"
"""CUDA's error if the fabric manager of a machine with NVSwitch is not running."""


def gpu_files() -> list[str]:
    """Device files of NVIDIA GPUs that this process may open; in a container, those passed to it."""
    return sorted(glob.glob("/dev/nvidia[0-9]*"))


def driver_version() -> str | None:
    """Version of the loaded NVIDIA driver, such as `580.95.05`; None without one."""
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    found = re.search(r"\b(\d{3}\.\d+(?:\.\d+)?)\b", text)
    return found[1] if found else None


def driver_cuda() -> tuple[int, int] | str:
    """The newest CUDA that the driver supports, (major, minor); or why its library does not answer."""
    try:
        library = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return str(error)
    number = ctypes.c_int()
    if code := library.cuDriverGetVersion(ctypes.byref(number)):
        return f"cuDriverGetVersion fails with {code}"
    return number.value // 1000, number.value % 1000 // 10


def torch_cuda() -> tuple[int, int] | None:
    """torch's CUDA version; None for a torch without CUDA."""
    if torch.version.cuda is None:
        return None
    major, minor = torch.version.cuda.split(".")[:2]
    return int(major), int(minor)


def unusable_gpus() -> Problem | None:
    """Why torch cannot compute on this machine's GPUs; None if it can, if there are none, or if they are hidden on purpose."""
    files = gpu_files()
    if torch.cuda.is_available() or not files or os.environ.get("CUDA_VISIBLE_DEVICES") in HIDDEN:
        return None
    there = f"this machine has {len(files)} NVIDIA GPU{'s' if len(files) > 1 else ''}"
    needed, known = torch_cuda(), driver_cuda()
    if needed is None:
        return Problem(
            what=f"{there}, but torch {torch.__version__} is built without CUDA",
            cure=f"pip install --force-reinstall torch=={torch.__version__.partition('+')[0]}; {ON_CPU}",
        )
    cuda = ".".join(map(str, needed))
    if isinstance(known, str):
        return Problem(
            what=f"{there}, but the driver's library does not answer ({known})",
            cure="reinstall the NVIDIA driver, or give the container its library (docker run --gpus all, "
            f"NVIDIA_DRIVER_CAPABILITIES=compute,utility); {ON_CPU}",
        )
    if known[0] < needed[0]:
        oldest, driver = OLDEST_DRIVER[needed[0]], driver_version() or "of unknown version"
        return Problem(
            what=f"{there}, but the driver ({driver}) is too old: it supports CUDA {known[0]}.{known[1]}, but torch "
            f"{torch.__version__} needs CUDA {cuda}",
            cure=f"update it to {oldest} or newer (Ubuntu: apt install nvidia-driver-{oldest.partition('.')[0]}-server), or "
            f"install a torch for CUDA {known[0]} (https://pytorch.org/get-started); {ON_CPU}",
        )
    error = cuda_error()
    cure = "check whether nvidia-smi lists them, and restart the machine if not"
    if SYSTEM_NOT_READY in error:
        cure = "start the fabric manager: systemctl start nvidia-fabricmanager"
    return Problem(what=f"{there}, but CUDA does not start ({error})", cure=f"{cure}; {ON_CPU}")


def cuda_error() -> str:
    """torch's error message when CUDA does not start."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split())
    return "torch sees no device"


def unsupported_gpus() -> Problem | None:
    """GPUs for which torch has no kernels, because they are older or newer than its targets; None if there are none."""
    if not torch.cuda.is_available() or torch.version.cuda is None:
        return None
    compiled = torch.cuda.get_arch_list()
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if not has_kernels(capability, compiled):
            oldest = min((parse_architecture(name) for name in compiled), default=(0, 0))
            older = capability < oldest
            return Problem(
                what=f"GPU {index} ({torch.cuda.get_device_name(index)}, sm_{capability[0]}{capability[1]}) is "
                f"{'too old' if older else 'unknown'} for torch {torch.__version__}, which has kernels for "
                f"{', '.join(compiled)} only",
                cure="use a newer GPU, or a torch for an older CUDA (https://pytorch.org/get-started)"
                if older
                else "install a newer torch, or one for a newer CUDA (https://pytorch.org/get-started)",
            )
    return None


def has_kernels(capability: tuple[int, int], compiled: list[str]) -> bool:
    """Whether code for these architectures (`sm_90`, `sm_90a`, `compute_120`) runs on a GPU of this compute capability."""
    for name in compiled:
        target = parse_architecture(name)
        if name.startswith("compute_") and target <= capability:  # the driver compiles it for newer GPUs
            return True
        specific = name[-1].isalpha()
        if target == capability or (not specific and target[0] == capability[0] and target < capability):
            return True
    return False


def parse_architecture(name: str) -> tuple[int, int]:
    """(major, minor) of a name such as `sm_90a`."""
    digits = re.sub(r"\D", "", name)
    return int(digits[:-1] or 0), int(digits[-1:] or 0)


def find_nvcc() -> str | None:
    """CUDA's compiler, with the headers for building extensions: from NVIDIA's wheel, or from a toolkit."""
    home = os.environ.get("CUDA_HOME")
    wheels = glob.glob(str(Path(sysconfig.get_path("purelib")) / "nvidia" / "*" / "bin" / "nvcc"))
    for path in (*wheels, *([f"{home}/bin/nvcc"] if home else []), shutil.which("nvcc"), "/usr/local/cuda/bin/nvcc"):
        if path and os.access(path, os.X_OK):
            return path
    return None


def find_compiler() -> str | None:
    """The C compiler that Triton calls at run time, for torch.compile."""
    return os.environ.get("CC") or next((path for path in map(shutil.which, ("gcc", "clang", "cc")) if path), None)

"""Transformer Engine: whether it is installed and works, and how to install it."""

from __future__ import annotations

import importlib.util
import os
import sys

import torch

from mpo_megatron.config import ConfigError
from mpo_megatron.stack.cuda import find_nvcc, torch_cuda
from mpo_megatron.stack.imports import diagnose, import_error, version_of
from mpo_megatron.stack.problem import Problem

MODULE = "transformer_engine.pytorch"


def is_installed() -> bool:
    """Whether Transformer Engine is installed, working or not."""
    package = MODULE.partition(".")[0]
    return sys.modules.get(package) is not None or (package not in sys.modules and importlib.util.find_spec(package) is not None)


def install_transformer_engine() -> str:
    """How to install it for this torch, including missing build tools."""
    cuda = torch_cuda() or (13, 0)
    build = f"NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install --no-build-isolation 'transformer-engine[core_cu{cuda[0]},pytorch]<2.21'"
    if find_nvcc() is not None:
        return f"install it: {build}"
    # torch's own wheels bring only part of the headers.
    toolkit = f"pip install 'cuda-toolkit[cccl,nvcc]=={cuda[0]}.{cuda[1]}.*' ninja pybind11"
    return f"nvcc, which builds it, is missing too: {toolkit}, then {build}"


def broken_transformer_engine() -> Problem | None:
    """Why the installed Transformer Engine does not work; None if it does, or is not installed."""
    if not is_installed():
        return None
    if (mismatch := other_cuda()) is not None:
        return mismatch
    error = import_error(MODULE)
    return None if error is None else diagnose("transformer-engine", error)


def other_cuda() -> Problem | None:
    """A Transformer Engine core for another CUDA than torch's; None if they agree."""
    ours = torch_cuda()
    for major in (12, 13):
        version = version_of(f"transformer-engine-cu{major}")
        if version is not None and ours is not None and major != ours[0]:
            return Problem(
                what=f"transformer-engine-cu{major} {version} is built for CUDA {major}, torch {torch.__version__} for CUDA "
                f"{ours[0]}.{ours[1]}",
                cure=f"pip uninstall transformer-engine-cu{major} transformer-engine-torch transformer-engine, then "
                f"{install_transformer_engine()}",
            )
    return None


def import_transformer_engine() -> None:
    """Import Transformer Engine first, if installed: Megatron-Core tolerates only ImportError.

    After an ImportError, Megatron-Core runs without it, which is fine without a GPU; with a GPU, `mpo train` then refuses to
    start (stack/checks.py).
    """
    if not is_installed():
        return
    error = import_error(MODULE)
    if error is None or error.startswith(("ImportError:", "ModuleNotFoundError:")):
        return
    package = importlib.util.find_spec("transformer_engine")
    where = os.path.dirname(package.origin) if package is not None and package.origin else "transformer_engine"
    raise ConfigError(
        f"{where}: {diagnose('transformer-engine', error)}; without it: pip uninstall transformer-engine "
        "transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13."
    )

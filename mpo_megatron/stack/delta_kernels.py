"""flash-linear-attention, the kernels of Gated DeltaNet layers: whether it is installed and computes correctly on this GPU."""

from __future__ import annotations

import importlib.util

import torch
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from mpo_megatron.stack.imports import diagnose, import_error, version_of

NAME = "flash-linear-attention"
MODULE = "fla.ops.gated_delta_rule"
VERSIONS = SpecifierSet(">=0.5.2,<0.7")
"""Versions before 0.5.2 may compute wrong states on Blackwell GPUs, and do not let value heads share keys; 0.6 is the newest
tested version."""
INSTALL = f"pip install '{NAME}{VERSIONS}'"
WRONG_ON_HOPPER = SpecifierSet(">=3.4,<3.7.1")
"""Versions of Triton that compile wrong gradients of the decay for Hopper GPUs (flash-linear-attention's issue 640)."""


def missing_for_delta_kernels() -> str | None:
    """Why the kernels cannot be used on this machine, with the fix; None if they can. Imports none of them."""
    if not is_installed():
        return f"{NAME} is not installed: {INSTALL}"
    version = version_of("fla-core") or version_of(NAME)
    if version is None or not VERSIONS.contains(version, prereleases=True):
        return f"{NAME} {version or 'of no known version'} is installed, but {VERSIONS} is needed: {INSTALL}"
    triton = version_of("triton")
    if triton is not None and is_hopper() and Version(triton) in WRONG_ON_HOPPER and not _has("tilelang"):
        return (
            f"Triton {triton} compiles wrong gradients for Hopper GPUs: pip install 'tilelang>=0.1.9', or install torch 2.13 or "
            "later, which brings Triton 3.7.1"
        )
    return None


def broken_delta_kernels() -> str | None:
    """Why importing the installed package fails, with the fix; None if it does not."""
    error = import_error(MODULE)
    return None if error is None else str(diagnose(NAME, error))


def is_installed() -> bool:
    """Whether flash-linear-attention is installed, working or not."""
    return _has("fla")


def is_hopper() -> bool:
    """Whether this process's GPU is a Hopper GPU."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9


def _has(module: str) -> bool:
    return importlib.util.find_spec(module) is not None

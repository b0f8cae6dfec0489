"""Checks of the installation before `mpo train` loads anything."""

from __future__ import annotations

import torch

from mpo_megatron.config import ConfigError
from mpo_megatron.device import computes_bf16
from mpo_megatron.stack.cuda import unsupported_gpus, unusable_gpus
from mpo_megatron.stack.imports import diagnose, import_error
from mpo_megatron.stack.packages import PACKAGES, is_importable
from mpo_megatron.stack.problem import Problem
from mpo_megatron.stack.transformer_engine import broken_transformer_engine, install_transformer_engine, is_installed

ATTENTION = ("flash-attn", "flash-attn-3", "nvidia-cudnn-frontend")
"""Packages whose kernels are used automatically if they import."""

APEX_EXTENSION = "fused_weight_gradient_mlp_cuda"
"""Module of NVIDIA's apex that adds weight gradients to their buffer inside the GEMM; not needed with Transformer Engine."""


def require_working_gpus(backend: str) -> None:
    """Refuse to train on a CPU if torch cannot use an existing GPU, or on slow layers if Transformer Engine is broken.

    Args:
        backend: `model.backend`
    Raises:
        ConfigError: gives the fix.
    """
    if (problem := unusable_gpus() or unsupported_gpus()) is not None:
        raise ConfigError(f"{problem}.")
    if torch.cuda.is_available() and backend != "local" and (problem := broken_transformer_engine()) is not None:
        raise ConfigError(f"model.backend = {backend}, but {problem}. Or set model.backend to local (no FP8, slower layers).")


def has_fused_gradients() -> bool:
    """Whether layers other than Transformer Engine's can add weight gradients inside the GEMM: needs NVIDIA's apex."""
    return torch.cuda.is_available() and import_error(APEX_EXTENSION) is None


def slow_bf16(precision: str) -> Problem | None:
    """That the processor computes bfloat16 slowly, if it does.

    Args:
        precision: model.precision
    """
    if precision == "fp32" or computes_bf16():
        return None
    return Problem(
        what="this processor has no instructions for bfloat16, which takes several times as long as fp32",
        cure="set model.precision to fp32",
        severity="warning",
    )


def shortfalls(*, transformer_engine: bool, precision: str) -> list[str]:
    """Reasons why a run is slower than possible, one line each.

    Args:
        transformer_engine: whether it provides the layers
        precision: model.precision
    """
    if not torch.cuda.is_available():
        slow = slow_bf16(precision)
        return [] if slow is None else [str(slow)]
    found = []
    if not transformer_engine and not is_installed():
        found.append(f"Transformer Engine is not installed: layers are slower, without FP8; {install_transformer_engine()}")
    if not transformer_engine and not has_fused_gradients():
        found.append(
            "NVIDIA's apex is not installed: without Transformer Engine, weight gradients are added in a separate pass; "
            "install either"
        )
    for package in PACKAGES:
        if package.name in ATTENTION and is_importable(package) and (error := import_error(package.module)) is not None:
            found.append(f"attention runs without {package.name}: {diagnose(package.name, error)}")
    return found

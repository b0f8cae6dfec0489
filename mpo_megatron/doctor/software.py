"""The packages of a run on GPUs: versions, CUDA versions, and whether each imports."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from mpo_megatron.stack.cuda import torch_cuda
from mpo_megatron.stack.imports import diagnose, import_error_apart, version_of
from mpo_megatron.stack.packages import PACKAGES, Package, is_importable, linked_cuda, other_apex, other_cudas, unmet_requirements
from mpo_megatron.stack.problem import Problem
from mpo_megatron.stack.transformer_engine import install_transformer_engine, is_installed, other_cuda

INSTALLED, IMPORTS, ABSENT, BROKEN = "installed", "imports", "absent", "does not import"
"""States of a package; the first means that its import is not tested separately."""


def describe_software(*, has_gpus: bool) -> tuple[list[dict[str, Any]], list[Problem]]:
    """(per package: name, version, cuda, state, error, serves; problems).

    Args:
        has_gpus: problems of GPU packages are errors only with GPUs
    """
    installed = [package for package in PACKAGES if version_of(package.name) is not None or is_importable(package)]
    tried = [package for package in installed if package.optional]  # the doctor's other checks import the rest
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:  # each import runs in a process; vllm's takes half a minute
        errors = dict(zip((package.name for package in tried), pool.map(_import, tried), strict=True))
    rows = [_row(package, package in installed, errors.get(package.name)) for package in PACKAGES]
    problems = [*unmet_requirements(), *_failures(errors, has_gpus=has_gpus), *other_cudas()]
    for problem in (other_cuda(), other_apex()):
        if problem is not None:
            problems.append(problem)
    if has_gpus and not is_installed():
        what = "Transformer Engine is not installed: no FP8, slower layers"
        problems.append(Problem(what=what, cure=install_transformer_engine(), severity="warning"))
    return rows, problems


def _import(package: Package) -> str | None:
    return import_error_apart(package.module)


def _row(package: Package, installed: bool, error: str | None) -> dict[str, Any]:
    if package.name == "torch":
        cuda = torch_cuda()
        built_for = None if cuda is None else f"{cuda[0]}.{cuda[1]}"
    else:
        major = linked_cuda(package) if installed else None
        built_for = None if major is None else str(major)
    return {
        "package": package.name,
        "version": version_of(package.name),
        "cuda": built_for,
        "state": _state(package, installed, error),
        "error": error,
        "serves": package.serves,
    }


def _state(package: Package, installed: bool, error: str | None) -> str:
    if not installed:
        return ABSENT
    if not package.optional:
        return INSTALLED
    return IMPORTS if error is None else BROKEN


def _failures(errors: dict[str, str | None], *, has_gpus: bool) -> list[Problem]:
    """Packages that do not import; without a GPU, GPU packages need not."""
    found = []
    for package in PACKAGES:
        error = errors.get(package.name)
        if error is None:
            continue
        problem = diagnose(package.name, error)
        needed = has_gpus and package.name == "transformer-engine"
        found.append(replace(problem, severity="error" if needed else "warning"))
    return found

"""The packages used by a run on GPUs: versions, their CUDA, and whether they are compatible."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import mmap
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mpo_megatron.stack.cuda import torch_cuda
from mpo_megatron.stack.imports import reinstall, version_of
from mpo_megatron.stack.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Package:
    """A package, and its use here."""

    name: str
    """Name of its distribution."""
    module: str
    """The module to import."""
    serves: str
    """Its use in a run."""
    compiled: tuple[str, ...] = ()
    """Distributions with its compiled part, if separate."""
    optional: bool = True


PACKAGES = (
    Package(name="torch", module="torch", serves="everything", optional=False),
    Package(name="megatron-core", module="megatron.core", serves="model, optimizer, checkpoints", optional=False),
    Package(name="transformers", module="transformers", serves="configurations, tokenizers, embedded generation", optional=False),
    Package(
        name="transformer-engine",
        module="transformer_engine.pytorch",
        serves="fused layers, FP8, optimizer offload",
        compiled=("transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13"),
    ),
    Package(name="flash-attn", module="flash_attn", serves="attention: FlashAttention 2"),
    Package(name="flash-attn-3", module="flash_attn_interface", serves="attention: FlashAttention 3 (Hopper)"),
    Package(name="nvidia-cudnn-frontend", module="cudnn", serves="attention: cuDNN, through Transformer Engine"),
    Package(
        name="apex",
        module="apex",
        serves="without Transformer Engine: fused weight gradients, fused Adam",
    ),
    Package(name="nvidia-resiliency-ext", module="nvidia_resiliency_ext", serves="writing checkpoints while training continues"),
    Package(name="vllm", module="vllm", serves="fast generation, also during training"),
    Package(name="flash-linear-attention", module="fla", serves="Gated DeltaNet layers: Qwen3-Next, 3.5, 3.6"),
    Package(name="triton", module="triton", serves="torch.compile and Gated DeltaNet layers on GPUs"),
)
"""In the order in which `mpo doctor` lists them."""

CUDA_LIBRARY = re.compile(rb"lib(?:cudart|cublas|cublasLt|nvrtc)\.so\.(\d+)")
"""How a shared library names the CUDA it is linked to."""

SELF_CHECKED = ("torch", "triton", "transformer-engine")
"""Not compared with torch's CUDA by their links: the first two are torch's, the third has one name per CUDA version."""


LIVE_VLLM = SpecifierSet(">=0.33,<0.34")
"""Versions of vLLM with the weight update interface of live engines (tools/vllm_names.py); others only generate."""


def missing_for_live_vllm() -> str | None:
    """Why no vLLM here can sample during training, with the fix; None if one can."""
    version = version_of("vllm")
    if version is None:
        return f"vllm is not installed: pip install 'vllm{LIVE_VLLM}'"
    if not LIVE_VLLM.contains(version, prereleases=True):
        return f"vllm {version} has another weight update interface than vllm{LIVE_VLLM}: pip install 'vllm{LIVE_VLLM}'"
    return None


def is_importable(package: Package) -> bool:
    """Whether the module exists, working or not."""
    root = package.module.partition(".")[0]
    return sys.modules.get(root) is not None or (root not in sys.modules and importlib.util.find_spec(root) is not None)


def linked_cuda(package: Package) -> int | None:
    """Major version of the CUDA in the links of a package's libraries: torch's if among several; None if there is none."""
    ours = torch_cuda()
    found: set[int] = set()
    for name in package.compiled or (package.name,):
        try:
            files = importlib.metadata.distribution(name).files or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if ".so" in file.name:
                for major in cudas_of_library(Path(str(file.locate()))):
                    if ours is not None and major == ours[0]:
                        return major
                    found.add(major)
    return max(found, default=None)


def cudas_of_library(path: Path) -> Iterator[int]:
    """Major versions of the CUDA libraries named in a shared library; one that loads them dynamically may name several."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            for match in CUDA_LIBRARY.finditer(content):
                yield int(match[1])
    except (OSError, ValueError):  # gone, or empty
        return


def other_cudas() -> list[Problem]:
    """Packages linked to another CUDA than torch's."""
    ours, found = torch_cuda(), []
    for package in PACKAGES:
        major = linked_cuda(package) if package.name not in SELF_CHECKED else None
        if ours is not None and major is not None and major != ours[0]:
            version = version_of(package.name)
            found.append(
                Problem(
                    what=f"{package.name} {version} is built for CUDA {major}, torch {version_of('torch')} for CUDA "
                    f"{ours[0]}.{ours[1]}",
                    cure=f"{reinstall(package.name, version)}; or without it: pip uninstall {package.name}",
                )
            )
    return found


def unmet_requirements() -> list[Problem]:
    """Versions outside the requirements of this package or of another in the table, such as a vllm built for another torch."""
    found = []
    for name in ("mpo-megatron", *(package.name for package in PACKAGES)):
        try:
            texts = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for requirement in map(Requirement, texts):
            extras = ("", "gpu", "hybrid", "rollout", "tracking") if name == "mpo-megatron" else ("",)
            if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in extras):
                continue
            version = version_of(requirement.name)
            if version is None or requirement.specifier.contains(version, prereleases=True):
                continue
            ours = name == "mpo-megatron"
            found.append(
                Problem(
                    what=f"{requirement.name} {version} is installed, but {name} {version_of(name)} needs "
                    f"{requirement.name}{requirement.specifier}",
                    cure=f"pip install '{requirement.name}{requirement.specifier}'",
                    severity="error" if ours or requirement.name == "torch" else "warning",
                )
            )
    return found


def other_apex() -> Problem | None:
    """The package index's `apex`, which is not NVIDIA's; None if not installed."""
    if version_of("apex") is None or importlib.util.find_spec("apex") is None:
        return None
    places = importlib.util.find_spec("apex").submodule_search_locations or []  # type: ignore[union-attr]
    if any((Path(place) / "multi_tensor_apply").is_dir() for place in places):
        return None
    return Problem(
        what=f"apex {version_of('apex')} comes from the package index, and is another project than NVIDIA's apex",
        cure="pip uninstall apex, and if you want NVIDIA's: pip install --no-build-isolation git+https://github.com/NVIDIA/apex",
        severity="warning",
    )

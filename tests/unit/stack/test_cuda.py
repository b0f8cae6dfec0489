"""GPUs that torch cannot use are named with their fix, and `mpo train` does not fall back to the CPU."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from mpo_megatron.config import ConfigError, TrainConfig, from_dict
from mpo_megatron.stack import cuda
from mpo_megatron.stack.checks import require_working_gpus
from mpo_megatron.train.inputs import open_inputs


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two H100 that torch cannot use: torch for CUDA 13.0, a driver that knows 13.0."""

    def change(**values: Any) -> None:
        for name, value in values.items():
            monkeypatch.setattr(cuda, name, lambda value=value: value)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")
    change(gpu_files=["/dev/nvidia0", "/dev/nvidia1"], driver_version="580.95.05", driver_cuda=(13, 0), torch_cuda=(13, 0))
    change(cuda_error="CUDA unknown error")
    return change


def test_an_old_driver(machine: Any) -> None:
    machine(driver_version="535.104.05", driver_cuda=(12, 2))
    problem = cuda.unusable_gpus()
    assert problem is not None
    assert problem.what == (
        "this machine has 2 NVIDIA GPUs, but the driver (535.104.05) is too old: it supports CUDA 12.2, but torch 2.14.0+cu130 "
        "needs CUDA 13.0"
    )
    assert problem.cure.startswith(
        "update it to 580.65 or newer (Ubuntu: apt install nvidia-driver-580-server), or install a torch"
    )
    assert "CUDA_VISIBLE_DEVICES= mpo" in problem.cure


def test_a_driver_of_the_same_major_version_is_new_enough(machine: Any) -> None:
    machine(torch_cuda=(13, 2))
    problem = cuda.unusable_gpus()
    assert problem is not None
    assert "CUDA does not start (CUDA unknown error)" in problem.what


def test_a_torch_without_cuda(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.14.0+cpu")
    machine(torch_cuda=None)
    problem = cuda.unusable_gpus()
    assert problem is not None
    assert problem.what.endswith("torch 2.14.0+cpu is built without CUDA")
    assert problem.cure.startswith("pip install --force-reinstall torch==2.14.0;")


def test_a_container_without_the_drivers_library(machine: Any) -> None:
    machine(driver_cuda="libcuda.so.1: cannot open shared object file: No such file or directory")
    problem = cuda.unusable_gpus()
    assert problem is not None
    assert "docker run --gpus all" in problem.cure


def test_a_fabric_manager_that_is_not_running(machine: Any) -> None:
    machine(cuda_error="Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized")
    problem = cuda.unusable_gpus()
    assert problem is not None
    assert "systemctl start nvidia-fabricmanager" in problem.cure


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_gpus_that_are_hidden_on_purpose_are_no_problem(machine: Any, monkeypatch: pytest.MonkeyPatch, hidden: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert cuda.unusable_gpus() is None


def test_no_gpu_is_no_problem(machine: Any) -> None:
    machine(gpu_files=[])
    assert cuda.unusable_gpus() is None
    require_working_gpus("auto")


def test_train_refuses_before_it_opens_anything(machine: Any) -> None:
    machine(driver_cuda=(12, 2))
    config = from_dict(TrainConfig, {"output": "run", "model": {"checkpoint": "none"}, "data": {"train": "none"}}, "test")
    with pytest.raises(ConfigError, match=r"the driver \(580.95.05\) is too old: it supports CUDA 12.2"):
        open_inputs(config, 1, cast(Any, None), 0, cast(Any, None))


@pytest.mark.parametrize(
    ("capability", "compiled", "expected"),
    [
        ((9, 0), ["sm_80", "sm_90"], True),
        ((8, 6), ["sm_80", "sm_90"], True),  # binary compatible within a major version
        ((8, 0), ["sm_86"], False),
        ((7, 0), ["sm_75", "sm_80"], False),
        ((12, 1), ["sm_90", "compute_120"], True),  # compiled further by the driver
        ((10, 3), ["sm_100a"], False),  # code for this GPU only
        ((10, 0), ["sm_100a"], True),
        ((11, 0), ["sm_90", "sm_100"], False),
    ],
)
def test_which_gpus_kernels_run_on(capability: tuple[int, int], compiled: list[str], expected: bool) -> None:
    assert cuda.has_kernels(capability, compiled) is expected


@pytest.mark.parametrize(
    ("capability", "message", "cure"),
    [
        ((7, 0), r"GPU 0 \(Some GPU, sm_70\) is too old for torch .*kernels for sm_75, sm_90", "a torch for an older CUDA"),
        ((10, 0), r"GPU 0 \(Some GPU, sm_100\) is unknown for torch", "install a newer torch"),
    ],
)
def test_a_gpu_without_kernels(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], message: str, cure: str) -> None:
    values = {
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "get_arch_list": lambda: ["sm_75", "sm_90"],
        "get_device_capability": lambda index: capability,
        "get_device_name": lambda index: "Some GPU",
    }
    for name, value in values.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(ConfigError, match=message) as refused:
        require_working_gpus("auto")
    assert cure in str(refused.value)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    assert cuda.unsupported_gpus() is None


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19 01:15:15 UTC 2023",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.104.05  Release Build",
    ],
)
def test_the_drivers_version(monkeypatch: pytest.MonkeyPatch, line: str) -> None:
    monkeypatch.setattr(cuda.Path, "read_text", lambda path: line + "\nGCC version:  gcc version 12.2.0")
    assert cuda.driver_version() == "535.104.05"

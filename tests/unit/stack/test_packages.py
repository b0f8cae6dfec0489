"""Packages that are incompatible or do not import: named with the command that fixes it."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from mpo_megatron.config import ConfigError, ModelConfig
from mpo_megatron.model import architecture, precision
from mpo_megatron.stack import checks, cuda, packages, transformer_engine
from mpo_megatron.stack.imports import diagnose, import_error_apart
from mpo_megatron.stack.packages import PACKAGES, linked_cuda, other_apex, other_cudas, unmet_requirements
from tests.unit.stack.packages import install

ENGINE = "transformer_engine.pytorch"
UNDEFINED = "raise ImportError('/x/transformer_engine_torch.so: undefined symbol: _ZNK3c106Device3strEv')\n"
FLASH = next(package for package in PACKAGES if package.name == "flash-attn")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that torch can use, of CUDA 13.0."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch, "__version__", "2.14.0+cu130")


def forget_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformer_engine"]:
        monkeypatch.delitem(sys.modules, name)


@pytest.mark.usefixtures("gpu")
def test_an_engine_for_another_torch_is_an_error_of_train(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_engine(monkeypatch)
    install(site, "transformer-engine", "2.20.2", module=ENGINE, source=UNDEFINED)
    install(site, "transformer-engine-torch", "2.20.2")
    with pytest.raises(ConfigError) as refused:
        checks.require_working_gpus("auto")
    message = str(refused.value)
    assert message.startswith(
        "model.backend = auto, but transformer-engine 2.20.2 is installed but does not import (ImportError: /x/"
    )
    assert "it is built for another torch; NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install" in message
    assert "--no-build-isolation transformer-engine-torch==2.20.2. Or set model.backend to local" in message
    checks.require_working_gpus("local")
    with pytest.raises(ConfigError, match=r"model.backend = transformer_engine, but .*built for another torch"):
        architecture.use_transformer_engine(ModelConfig(checkpoint="", backend="transformer_engine"))


@pytest.mark.usefixtures("gpu")
def test_an_engine_for_another_cuda_is_an_error_of_train(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    forget_engine(monkeypatch)
    install(site, "transformer-engine", "2.20.2", module=ENGINE)
    checks.require_working_gpus("auto")
    install(site, "transformer-engine-cu12", "2.20.2")
    with pytest.raises(
        ConfigError, match=r"transformer-engine-cu12 2.20.2 is built for CUDA 12, torch 2.14.0\+cu130 for CUDA 13.0;"
    ) as it:
        checks.require_working_gpus("auto")
    assert "pip uninstall transformer-engine-cu12 transformer-engine-torch transformer-engine, then install it: " in str(it.value)
    assert "'transformer-engine[core_cu13,pytorch]<2.21'" in str(it.value)


@pytest.mark.usefixtures("gpu")
def test_how_an_absent_engine_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    checks.require_working_gpus("auto")  # absence is reported, but no error
    monkeypatch.setattr(transformer_engine, "find_nvcc", lambda: "/usr/bin/nvcc")
    told = checks.shortfalls(transformer_engine=False, precision="bf16")
    assert told[0].startswith("Transformer Engine is not installed: layers are slower, without FP8; install it: NVTE_BUILD")
    assert "apex is not installed" in told[1]
    assert checks.shortfalls(transformer_engine=True, precision="bf16") == []


@pytest.mark.usefixtures("gpu")
def test_no_nvcc(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setattr(transformer_engine, "find_nvcc", lambda: None)
    missing = precision.missing_for_transformer_engine()
    assert missing is not None
    assert missing.startswith(
        "Transformer Engine is not installed; nvcc, which builds it, is missing too: "
        "pip install 'cuda-toolkit[cccl,nvcc]==13.0.*' ninja pybind11, then NVTE_BUILD_USE_NVIDIA_WHEELS=1 pip install"
    )


def test_where_nvcc_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda.shutil, "which", lambda name: None)
    monkeypatch.setattr(cuda.sysconfig, "get_path", lambda name: str(tmp_path / "site"))
    monkeypatch.setattr(cuda.os, "access", lambda path, mode: str(path).startswith(str(tmp_path)) and Path(path).exists())
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert cuda.find_nvcc() is None
    for folder in ("home/bin", "site/nvidia/cu13/bin"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "nvcc").touch()
    assert cuda.find_nvcc() == str(tmp_path / "site/nvidia/cu13/bin/nvcc")
    (tmp_path / "site/nvidia/cu13/bin/nvcc").unlink()
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert cuda.find_nvcc() == str(tmp_path / "home/bin/nvcc")


def test_a_library_tells_its_cuda(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "torch_cuda", lambda: (13, 0))
    assert linked_cuda(FLASH) is None
    install(site, "flash-attn", "2.8.3", library=b"\x7fELF..libc.so.6\0libcudart.so.12\0")
    assert linked_cuda(FLASH) == 12
    (problem,) = [found for found in other_cudas() if found.what.startswith("flash-attn")]
    assert problem.what.startswith("flash-attn 2.8.3 is built for CUDA 12, torch ")
    assert problem.cure.startswith(
        "pip install --no-cache-dir --force-reinstall --no-deps --no-build-isolation flash-attn==2.8.3"
    )
    (site / "flash-attn.so").write_bytes(b"libcublas.so.12\0libcublas.so.13\0")  # it opens installed libraries
    assert linked_cuda(FLASH) == 13
    monkeypatch.setattr(packages, "torch_cuda", lambda: (12, 9))
    assert linked_cuda(FLASH) == 12
    assert not [found for found in other_cudas() if found.what.startswith("flash-attn")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("precision", "fast", "told"), [("bf16", False, True), ("bf16", True, False), ("fp32", False, False)])
def test_a_processor_without_bfloat16_is_told(monkeypatch: pytest.MonkeyPatch, precision: str, fast: bool, told: bool) -> None:
    monkeypatch.setattr(checks, "computes_bf16", lambda: fast)
    found = checks.shortfalls(transformer_engine=False, precision=precision)
    assert [line.endswith("set model.precision to fp32") for line in found] == [True] * told


@pytest.mark.usefixtures("gpu")
def test_a_broken_attention_package_is_told(site: Path) -> None:
    library = "libcudart.so.12: cannot open shared object file: No such file or directory"
    install(site, "flash-attn", "2.8.3", module="flash_attn", source=f"raise ImportError('{library}')\n")
    (told,) = checks.shortfalls(transformer_engine=True, precision="bf16")
    assert told.startswith(
        "attention runs without flash-attn: flash-attn 2.8.3 is installed but does not import (ImportError: libcudart"
    )
    assert "it is built for another CUDA; pip install --no-cache-dir" in told


def test_a_vllm_for_another_torch(site: Path) -> None:
    install(site, "vllm", "0.33.0", requires=("torch==1.0.0", "numpy", "nothing-like-it==1 ; extra == 'x'"))
    (problem,) = [found for found in unmet_requirements() if "vllm" in found.what]
    assert problem.what.endswith("is installed, but vllm 0.33.0 needs torch==1.0.0")
    assert (problem.cure, problem.severity) == ("pip install 'torch==1.0.0'", "error")


def test_this_environment_meets_its_requirements() -> None:
    assert [found.what for found in unmet_requirements() if "mpo-megatron" in found.what] == []


def test_the_other_apex(site: Path) -> None:
    assert other_apex() is None
    install(site, "apex", "0.9.10", module="apex.pyramid")
    problem = other_apex()
    assert problem is not None
    assert problem.cure.startswith("pip uninstall apex")
    (site / "apex/multi_tensor_apply").mkdir()
    assert other_apex() is None


@pytest.mark.parametrize(
    ("error", "what", "cure"),
    [
        ("ImportError: x.so: undefined symbol: _ZN3c10", "built for another torch", "transformer-engine-torch=="),
        ("OSError: libcublas.so.12: cannot open shared object file", "built for another CUDA", "transformer-engine-torch=="),
        ("OSError: libcudnn.so.9: cannot open shared object file", "there is no cuDNN", "nvidia-cudnn-cu13"),
        ("ImportError: libcuda.so.1: cannot open shared object file", "no NVIDIA driver", "--gpus all"),
        ("ImportError: /lib/libstdc++.so.6: version `GLIBCXX_3.4.32' not found", "a system with GLIBCXX_3.4.32", "pip install"),
        ("ModuleNotFoundError: No module named 'pydantic'", "does not import", "pip install pydantic, or"),
        ("RuntimeError: something else", "does not import (RuntimeError: something else)", "transformer-engine-torch=="),
    ],
)
def test_what_an_error_means(site: Path, error: str, what: str, cure: str) -> None:
    install(site, "transformer-engine", "2.20.2")
    install(site, "transformer-engine-torch", "2.20.2")
    problem = diagnose("transformer-engine", error)
    assert what in problem.what
    assert cure in problem.cure
    assert error in problem.what


def test_a_core_without_its_extension(site: Path) -> None:
    install(site, "transformer-engine-cu13", "2.20.2")
    problem = diagnose("transformer-engine", "AssertionError: Could not find `transformer-engine`.")
    assert problem.what.startswith("transformer-engine 2.20.2 is installed but does not import (AssertionError: Could not find")
    assert problem.what.endswith("its extension for PyTorch is missing")
    assert problem.cure.endswith("pip install --no-build-isolation 'transformer-engine[pytorch]==2.20.2'")


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("print('hello')", None),
        ("raise ImportError('two\\nlines')", "ImportError: two lines"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "Crash: its import ends with SIGSEGV"),
        ("import time; time.sleep(60)", "TimeoutError: its import takes more than 5 s"),
    ],
)
def test_an_import_apart_may_do_anything(site: Path, monkeypatch: pytest.MonkeyPatch, source: str, expected: str | None) -> None:
    (site / "odd_package.py").write_text(source)
    root = Path(__file__).parents[3]
    monkeypatch.setenv("PYTHONPATH", f"{site}:{root}")
    seconds = 5 if "sleep" in source else 300
    assert import_error_apart("odd_package", seconds) == expected

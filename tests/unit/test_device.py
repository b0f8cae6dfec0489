"""The stand-ins for torch.cuda on a machine without a GPU, name by name: fails if an upgrade moves one."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo

from mpo_megatron import device
from mpo_megatron.config import ConfigError

device.prepare()

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")


def find(dotted: str) -> object:
    owner: object = torch.cuda
    for part in dotted.split("."):
        owner = getattr(owner, part)
    return owner


@needs_cpu
@pytest.mark.parametrize("name", sorted(device.cuda_stand_ins()))
def test_stand_in_is_installed_and_callable(name: str) -> None:
    stand_in = find(name)
    assert callable(stand_in)
    module = getattr(stand_in, "__module__", "")
    assert module == device.__name__, f"torch.cuda.{name} is still torch's own"


@needs_cpu
@pytest.mark.parametrize("name", device.FACTORIES)
def test_factories_put_cuda_tensors_on_the_cpu(name: str) -> None:
    arguments = {
        "arange": (3,),
        "as_tensor": ([1.0],),
        "empty": (3,),
        "full": ((3,), 1.0),
        "ones": (3,),
        "rand": (3,),
        "randint": (0, 5, (3,)),
        "randn": (3,),
        "tensor": ([1.0],),
        "zeros": (3,),
        "empty_like": (torch.zeros(3),),
        "full_like": (torch.zeros(3), 1.0),
        "ones_like": (torch.zeros(3),),
        "zeros_like": (torch.zeros(3),),
    }[name]
    for where in ("cuda", "cuda:0", torch.device("cuda")):
        assert getattr(torch, name)(*arguments, device=where).device.type == "cpu"


@needs_cpu
def test_tensors_answer_as_on_a_gpu() -> None:
    tensor = torch.zeros(2)
    assert tensor.cuda() is tensor
    assert tensor.pin_memory() is tensor
    assert tensor.type() == "torch.cuda.FloatTensor"
    assert tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.float64).dtype == torch.float64
    assert torch.cuda.current_device() == torch.device("cpu")
    state = torch.cuda.get_rng_state()
    first = torch.rand(3)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3), first)


@needs_cpu
def test_gpu_is_not_claimed() -> None:
    assert not torch.cuda.is_available()
    assert not device.has_gpu()
    assert device.distributed_backend() == "gloo"
    assert 0 < device.peak_memory_gib() < 1024


def test_device_contexts_still_act_on_factories() -> None:
    with torch.device("meta"):
        assert torch.arange(3).is_meta
        assert torch.empty(3).is_meta
        assert torch.tensor([1.0]).is_meta


def test_transformers_in_the_same_process_keeps_its_buffers(tmp_path: Path) -> None:
    """from_pretrained builds on the meta device; rotary frequencies are computed, not loaded."""
    from transformers import AutoModelForCausalLM

    from tests.tiny import save_model

    model = AutoModelForCausalLM.from_pretrained(save_model(tmp_path / "hf"))
    frequencies = model.model.rotary_emb.inv_freq
    assert torch.allclose(frequencies, 10000.0 ** -(torch.arange(0, 32, 2) / 32))


def test_a_second_call_changes_nothing() -> None:
    before = {name: getattr(torch, name) for name in device.FACTORIES}
    device.prepare()
    assert before == {name: getattr(torch, name) for name in device.FACTORIES}


@needs_cpu
def test_optimizers_work_without_the_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch._dynamo", None)  # to import it is an error
    weight = torch.nn.Parameter(torch.ones(3))
    adam = torch.optim.AdamW([weight], lr=0.5, weight_decay=0.0)
    weight.grad = torch.ones(3)
    adam.step()
    adam.load_state_dict(adam.state_dict())
    adam.zero_grad()
    assert weight.grad is None
    assert torch.allclose(weight, torch.full((3,), 0.5))


def test_needless_packages_are_hidden_for_a_while_only() -> None:
    with device._without(("xdrlib", "json")):
        assert json.loads("1") == 1  # imported before
        with pytest.raises(ImportError):
            importlib.import_module("xdrlib")
    assert "xdrlib" not in sys.modules


def test_names_that_torch_dropped_fail_loudly() -> None:
    with pytest.raises(AttributeError, match="no longer exists"):
        device._replace(torch.cuda, "no_such_name", None)


def test_config_data_losses_import_without_megatron() -> None:
    code = (
        "import sys; sys.modules['megatron'] = None\n"
        "import mpo_megatron.config, mpo_megatron.losses\n"
        "import mpo_megatron.data.packing, mpo_megatron.data.loader, mpo_megatron.train.metrics"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


@pytest.mark.parametrize("failing", ["__init__", "pytorch"])
def test_a_broken_transformer_engine_is_one_message(tmp_path: Path, failing: str) -> None:
    """For any exception; Megatron-Core would end in a traceback."""
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("from . import pytorch\n")
    (package / "pytorch.py").touch()
    (package / f"{failing}.py").write_text("raise RuntimeError('undefined symbol:\\n  _ZN3c10')\n")
    (tmp_path / "input").mkdir()
    command = [sys.executable, "-m", "mpo_megatron.cli", "convert", "--input", "input", "--output", "output"]
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{root}"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        f"mpo convert: {package}: transformer-engine is installed but does not import (RuntimeError: undefined symbol: _ZN3c10): "
        "it is built for another torch; "
    )
    assert "without it: pip uninstall transformer-engine " in ended.stderr
    assert ended.stderr.count("\n") == 1


@pytest.mark.parametrize("error", [None, "ImportError: libcuda.so.1", "ModuleNotFoundError: No module named 'pydantic'"])
def test_megatron_tolerates_an_import_error_of_transformer_engine(monkeypatch: pytest.MonkeyPatch, error: str | None) -> None:
    monkeypatch.setattr(device, "is_installed", lambda: True)
    monkeypatch.setattr(device, "import_error", lambda module: error)
    device._import_transformer_engine()


def test_compiled_once_for_all_lengths_and_never_silently_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def scale(values: torch.Tensor, option: str) -> torch.Tensor:
        return values * len(option)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    monkeypatch.setattr(device, "COMPILED_VARIANTS", 14)
    compiled = device.compile_for_any_length(scale)
    for length in (5, 9, 300, 2, 17):
        assert torch.equal(compiled(torch.ones(length), "a"), torch.ones(length))
    assert len(graphs) == 1
    with ThreadPoolExecutor(1) as elsewhere:  # PyTorch's own limit is 8 per thread
        list(elsewhere.map(lambda options: compiled(torch.ones(3), options * "a"), range(2, 15)))
    assert len(graphs) == 14
    with torch._dynamo.config.patch(recompile_limit=8), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(torch.ones(3), "")


@pytest.mark.parametrize(("installed", "refused"), [(None, False), ("0.4.1", True), ("0.6.0", False), ("0.7.0.dev12", False)])
def test_an_old_resiliency_extension_is_named(installed: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core ends in an AttributeError with an older one; PyPI's newest is such."""

    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    if not refused:
        device._check_resiliency_extension()
        return
    with pytest.raises(ConfigError, match=r"nvidia-resiliency-ext 0\.4\.1 is installed, .* remove it \(pip uninstall"):
        device._check_resiliency_extension()


@pytest.mark.parametrize(("gpu", "given", "kept"), [(False, None, True), (True, None, False), (False, "MALLOC_ARENA_MAX", False)])
def test_freed_memory_is_kept_on_a_cpu_unless_the_user_sets_malloc(
    monkeypatch: pytest.MonkeyPatch, *, gpu: bool, given: str | None, kept: bool
) -> None:
    options: dict[int, int] = {}
    monkeypatch.setattr(device, "has_gpu", lambda: gpu)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=options.__setitem__))
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "1")
    device.keep_freed_memory()
    assert options == ({device.MALLOC_NUMBER_OF_MAPS: 0, device.MALLOC_TRIM_THRESHOLD: -1} if kept else {})


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace())
    device.keep_freed_memory()

"""Megatron-Core on this machine: the stand-ins for torch.cuda, name by name (fails if an upgrade moves one), and its imports."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from mpo_megatron.config import ConfigError
from mpo_megatron.mcore import cpu, preparation
from mpo_megatron.stack import transformer_engine

preparation.prepare()

needs_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="stand-ins are for machines without a GPU")


def find(dotted: str) -> object:
    owner: object = torch.cuda
    for part in dotted.split("."):
        owner = getattr(owner, part)
    return owner


@needs_cpu
@pytest.mark.parametrize("name", sorted(cpu.cuda_stand_ins()))
def test_stand_in_is_installed_and_callable(name: str) -> None:
    stand_in = find(name)
    assert callable(stand_in)
    module = getattr(stand_in, "__module__", "")
    assert module == cpu.__name__, f"torch.cuda.{name} is still torch's own"


@needs_cpu
@pytest.mark.parametrize("name", cpu.FACTORIES)
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
    before = {name: getattr(torch, name) for name in cpu.FACTORIES}
    preparation.prepare()
    assert before == {name: getattr(torch, name) for name in cpu.FACTORIES}


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
    with cpu._without(("xdrlib", "json")):
        assert json.loads("1") == 1  # imported before
        with pytest.raises(ImportError):
            importlib.import_module("xdrlib")
    assert "xdrlib" not in sys.modules


def test_names_that_torch_dropped_fail_loudly() -> None:
    with pytest.raises(AttributeError, match="no longer exists"):
        cpu._replace(torch.cuda, "no_such_name", None)


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
    monkeypatch.setattr(transformer_engine, "is_installed", lambda: True)
    monkeypatch.setattr(transformer_engine, "import_error", lambda module: error)
    transformer_engine.import_transformer_engine()


@pytest.mark.parametrize(("installed", "refused"), [(None, False), ("0.4.1", True), ("0.6.0", False), ("0.7.0.dev12", False)])
def test_an_old_resiliency_extension_is_named(installed: str | None, refused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Megatron-Core ends in an AttributeError with an older one; PyPI's newest is such."""

    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    if not refused:
        preparation._check_resiliency_extension()
        return
    with pytest.raises(ConfigError, match=r"nvidia-resiliency-ext 0\.4\.1 is installed, .* remove it \(pip uninstall"):
        preparation._check_resiliency_extension()

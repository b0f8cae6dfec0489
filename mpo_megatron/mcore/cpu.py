"""Megatron-Core on a CPU: what replaces the parts of CUDA that it uses.

Megatron-Core hard-codes CUDA (device "cuda", `torch.cuda.current_device()`, streams, RNG state, tensor type names). Exactly these
names are replaced, so that the same model, schedules, optimizer and checkpoints run on the CPU over gloo.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from mpo_megatron.stack.transformer_engine import import_transformer_engine

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
"""Functions of `torch` that Megatron-Core calls with device="cuda" or pin_memory=True."""

NEEDLESS = ("absl", "tensorboard", "wandb")
"""Packages that Megatron-Core imports if installed; it does not need them on a CPU, and importing them takes a second."""

NEVER_COMPILED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods of torch's optimizers that import the compiler only to exclude themselves from compilation."""

_CPU = torch.device("cpu")


def replace_cuda() -> None:
    """Replace the names of torch that Megatron-Core uses on every path."""
    for name, stand_in in cuda_stand_ins().items():
        _replace(torch.cuda, name, stand_in)
    # `with torch.device(…)` identifies factories by a table that it builds once: let it see the originals, or it would not apply
    # to them (and transformers' from_pretrained, which builds on the meta device, would lose its buffers).
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_names(torch.Tensor.type)  # type: ignore[method-assign]
    _spare_compiler()


def prepare_megatron() -> None:
    """Import Megatron-Core's modules that need changes on a CPU, and change them."""
    with _quiet_imports(), _eager_imports(), _without(NEEDLESS):
        import_transformer_engine()
        from megatron.core import jit
        from megatron.core.distributed import param_and_grad_buffer
        from megatron.core.tensor_parallel import layers, random
        from megatron.core.transformer.moe import token_dispatcher
    jit.disable_jit_fuser()  # applies to modules imported later
    # Its check that forked GPU randomness leaves the CPU's unchanged cannot hold where the CPU replaces the GPU.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    _replace(random, "_get_cuda_rng_state", lambda *args, **kwargs: torch.get_rng_state())
    _replace(random, "_set_cuda_rng_state", lambda state, *args, **kwargs: torch.set_rng_state(state))
    # NVIDIA's apex adds weight gradients to Megatron's buffer inside the GEMM; PyTorch can do the same.
    _replace(layers, "_grad_accum_fusion_available", True)
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add_weight_gradient)
    for name in ("dist_all_gather_func", "dist_reduce_scatter_func"):
        _replace(param_and_grad_buffer, name, _between_ranks(getattr(param_and_grad_buffer, name)))
    # Token counts from a GPU become numpy arrays, as all-to-all expects; from a CPU they would stay tensors.
    _replace(
        token_dispatcher,
        "maybe_move_tensor_to_cpu",
        lambda tensor, as_numpy=False, record_stream=False: tensor.numpy() if as_numpy and tensor is not None else tensor,
    )


def cuda_stand_ins() -> dict[str, Any]:
    """Names below `torch.cuda` that Megatron-Core uses on every path, with their replacements on a CPU."""

    def nothing() -> Callable[..., None]:
        return lambda *args, **kwargs: None  # a new function each time: torch.compile needs distinct ones

    return {
        "current_device": lambda: _CPU,
        "set_device": nothing(),
        "synchronize": nothing(),
        "empty_cache": nothing(),
        "ipc_collect": nothing(),
        "get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "random.get_rng_state": lambda *args, **kwargs: torch.get_rng_state(),
        "random.set_rng_state": lambda state, *args, **kwargs: torch.set_rng_state(state),
        "manual_seed": lambda seed: torch.default_generator.manual_seed(seed),
        "manual_seed_all": nothing(),  # torch.manual_seed calls this one
        "Stream": _NullStream,
        "Event": _NullStream,
        "current_stream": lambda *args, **kwargs: _NullStream(),
        "default_stream": lambda *args, **kwargs: _NullStream(),
        "stream": lambda *args, **kwargs: contextlib.nullcontext(),
        "nvtx.range_push": nothing(),
        "nvtx.range_pop": nothing(),
    }


class _NullStream:
    """Replaces a CUDA stream or event: everything is already complete."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __enter__(self) -> _NullStream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., Any]:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: None

    def query(self) -> bool:
        return True

    def record_event(self, event: object = None) -> _NullStream:
        return self

    def elapsed_time(self, end: object) -> float:
        return 0.0


def _replace(module: ModuleType, dotted: str, value: Any) -> None:
    """Replace an existing name of a module.

    Raises:
        AttributeError: this version of torch or Megatron-Core does not have it.
    """
    owner: Any = module
    *path, name = dotted.split(".")
    for part in path:
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        raise AttributeError(f"{module.__name__}.{dotted} no longer exists; mcore/cpu.py must follow")
    setattr(owner, name, value)


def _on_cpu(factory: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    @functools.wraps(factory)
    def on_cpu(*args: Any, **kwargs: Any) -> torch.Tensor:
        where = kwargs.get("device")
        if isinstance(where, (str, torch.device)) and torch.device(where).type == "cuda":
            kwargs["device"] = _CPU
        if kwargs.get("pin_memory"):
            kwargs["pin_memory"] = False
        return factory(*args, **kwargs)

    return on_cpu


def _cuda_type_names(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def type_name(self: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
        if dtype is not None:
            return original(self, dtype, *args, **kwargs)
        # The distributed optimizer sorts parameters by type names such as 'torch.cuda.FloatTensor'.
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_name


def _between_ranks(collective: Callable[..., Any]) -> Callable[..., Any]:
    """The collective, except in place on a single rank: gloo would copy all weights or gradients through two more buffers."""

    @functools.wraps(collective)
    def between_ranks(output: torch.Tensor, given: torch.Tensor, *, group: Any, async_op: bool = False, **options: Any) -> Any:
        in_place = output.data_ptr() == given.data_ptr() and output.numel() == given.numel()
        if group.size() == 1 and in_place and not async_op:  # whoever overlaps it waits for a result
            return None
        return collective(output, given, group=group, async_op=async_op, **options)

    return between_ranks


def _add_weight_gradient(inputs: torch.Tensor, grad_outputs: torch.Tensor, total: torch.Tensor) -> None:
    """total += grad_outputsᵀ @ inputs, [out, in] in float32."""
    if inputs.dtype is total.dtype:
        total.addmm_(grad_outputs.T, inputs)
    else:
        total += grad_outputs.T @ inputs


def _spare_compiler() -> None:
    """Keep torch's optimizers from importing its compiler, which takes a second; without effect if torch changes its names."""
    for name in NEVER_COMPILED:
        method = getattr(getattr(torch.optim.Optimizer, name), "__wrapped__", None)
        if method is not None:
            method.__dynamo_disable = method  # `torch._disable_dynamo` looks up the method to call here
    step = getattr(torch.optim.Adam.step, "__wrapped__", None)
    if step is not None:
        torch.optim.Adam.step = torch.no_grad()(step)  # type: ignore[method-assign]


@contextlib.contextmanager
def _without(packages: Sequence[str]) -> Iterator[None]:
    """Hide these packages from imports within the context, unless they were imported before."""
    hidden = [package for package in packages if package not in sys.modules]
    sys.modules |= dict.fromkeys(hidden)  # type: ignore[arg-type]  # None: an ImportError
    try:
        yield
    finally:
        for package in hidden:
            del sys.modules[package]


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    # "No CUDA runtime is found": nvcc without a GPU is normal.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _eager_imports() -> Iterator[None]:
    """Within this context, imported modules compile none of their functions, nor import the compiler, which takes a second:
    compiling tiny fused operations costs a CPU run more than it saves."""
    original = torch.compile
    torch.compile = lambda model=None, **options: model or (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original

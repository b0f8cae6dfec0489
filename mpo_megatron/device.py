"""GPU or CPU: the one module that knows.

Megatron-Core hard-codes CUDA (device "cuda", `torch.cuda.current_device()`, streams, RNG state, tensor type names). On a
machine without a GPU, `prepare()` puts stand-ins in place of exactly those names, so that the same model, schedules,
optimizer and checkpoints run on the CPU over gloo. With a GPU it does nothing. Call it before importing `megatron.core`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import os
import resource
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from packaging.version import Version
from torch.utils._device import _device_constructors

from mpo_megatron.config import ConfigError
from mpo_megatron.stack.imports import diagnose, import_error
from mpo_megatron.stack.transformer_engine import MODULE as TRANSFORMER_ENGINE
from mpo_megatron.stack.transformer_engine import is_installed

FACTORIES = (
    "arange", "as_tensor", "empty", "empty_like", "full", "full_like", "ones", "ones_like",
    "rand", "randint", "randn", "tensor", "zeros", "zeros_like",
)  # fmt: skip
"""Functions of `torch` that Megatron-Core calls with device="cuda" or pin_memory=True."""

POWER_OF_TWO_SCALES = "NVTE_FP8_CURRENT_SCALING_POWER_2_SCALES"
"""Environment variable that Transformer Engine reads at import."""

RESILIENCY_EXTENSION = "0.6.0"
"""Oldest nvidia-resiliency-ext that Megatron-Core can be imported beside; none at all will do, too."""

MEANINGLESS = (
    "Apex is not installed. Falling back to Torch Norm",  # norms are Transformer Engine's, or model/architecture.py's
    "If you are using transformer_engine as the transformer implementation, the core_attn",  # it is model/attention.py's
)
"""How those warnings of Megatron-Core begin that do not hold for this package's layers."""

COMPILED_VARIANTS = 64
"""Limit of `compile_for_any_length`, for each function."""

_CPU = torch.device("cpu")
_prepared = False


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device tensors of this process live on."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


def distributed_backend() -> str:
    """Back end of `torch.distributed` for this device."""
    return "nccl" if has_gpu() else "gloo"


def select(local_rank: int) -> None:
    """Bind this process to its GPU; nothing to do on a CPU."""
    if has_gpu():
        # Some schedulers show each process no other GPU than its own (Slurm: --gpus-per-task).
        torch.cuda.set_device(local_rank if torch.cuda.device_count() > 1 else 0)


def synchronize() -> None:
    """Wait for queued kernels, so that a clock read afterwards is honest."""
    if has_gpu():
        torch.cuda.synchronize()


def finish_computing() -> None:
    """Wait for the kernels of this process's own stream: not for exchanges beside it, in which the fast wait for the slow."""
    if has_gpu():
        torch.cuda.current_stream().synchronize()


def upload(values: np.ndarray[Any, Any] | torch.Tensor) -> torch.Tensor:
    """Host data on this process's device; a GPU takes it from pinned memory, so that no one waits for the copy."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device(), non_blocking=True) if has_gpu() else tensor


def compile_for_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled, once for all lengths of its tensors; once more for each other dtype, option or use of gradients.

    Past PyTorch's limit of 8 of these a call would silently run uncompiled, which can take the memory that the compiled function
    is there to save. The limit is raised, and to reach it is an error.
    """
    import torch._dynamo.config as dynamo  # takes a second

    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if dynamo.cache_size_limit < COMPILED_VARIANTS:  # of this thread: a GPU's backward passes have one of their own
            dynamo.cache_size_limit = COMPILED_VARIANTS
        return compiled(*args, **kwargs)

    return call


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU, in GiB."""
    if has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def gpu_bytes() -> int | None:
    """Memory of this process's GPU; None on a CPU."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) if has_gpu() else None


def gpu_name() -> str | None:
    """What the GPU calls itself, such as `NVIDIA H100 80GB HBM3`; None on a CPU."""
    return torch.cuda.get_device_name() if has_gpu() else None


def prepare() -> None:
    """Make Megatron-Core importable and runnable on this machine; safe to call again.

    Raises:
        ConfigError: Transformer Engine is installed, but broken, or nvidia-resiliency-ext is too old: Megatron-Core could not be
            imported.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    # Read when Transformer Engine is imported. With scales that are powers of 2, FP8's `current` recipe rounds a token the same
    # whatever else is in its row, but for numbers 2^15 times smaller than the row's largest (docs/reference/fp8.md).
    os.environ.setdefault(POWER_OF_TWO_SCALES, "1")
    quiet_megatron()
    _check_resiliency_extension()
    # Megatron-Core uses names that torch is about to rename; a user can do nothing about it.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    # NCCL's groups are not bound to the GPU in advance: each of Megatron's would open a communicator, used or not.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")
    if has_gpu():
        _import_transformer_engine()
        return
    for name, stand_in in cuda_stand_ins().items():
        _replace(torch.cuda, name, stand_in)
    # `with torch.device(…)` knows factories by identity, from a table it makes once: let it see the originals, or it would no
    # longer act on them (and transformers' from_pretrained, which builds on the meta device, would lose its buffers).
    _device_constructors()
    for name in FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    for owner in (torch.Tensor, torch.nn.Module):
        owner.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.pin_memory = lambda self, *args, **kwargs: self  # type: ignore[method-assign]
    torch.Tensor.type = _cuda_type_names(torch.Tensor.type)  # type: ignore[method-assign]
    _prepare_megatron()


def _check_resiliency_extension() -> None:
    """Refuse a version of nvidia-resiliency-ext that Megatron-Core fails to import beside: it looks for names of later ones."""
    try:
        found = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return
    if Version(found) < Version(RESILIENCY_EXTENSION):
        raise ConfigError(
            f"nvidia-resiliency-ext {found} is installed, and Megatron-Core cannot be imported beside a version before "
            f"{RESILIENCY_EXTENSION}; remove it (pip uninstall nvidia-resiliency-ext), or install a newer one."
        )


def quiet_megatron() -> None:
    """Hide warnings of Megatron-Core that tell a user nothing. One that may name lost speed is shown, by the main rank."""
    if not has_gpu() or os.environ.get("RANK", "0") != "0":  # on a CPU all that they miss is a GPU
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        return
    for message in MEANINGLESS:
        warnings.filterwarnings("ignore", message=message, module=r"megatron\..*")


def cuda_stand_ins() -> dict[str, Any]:
    """Names below `torch.cuda` that Megatron-Core uses on every path, with what stands for each on a CPU."""

    def nothing() -> Callable[..., None]:
        return lambda *args, **kwargs: None  # a new one each time: torch.compile wants distinct functions

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
    """Stands for a CUDA stream or event: everything is already done."""

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


def _replace(owner: Any, dotted: str, value: Any) -> None:
    *path, name = dotted.split(".")
    for part in path:
        owner = getattr(owner, part)
    if not hasattr(owner, name):
        raise AttributeError(f"torch.cuda.{dotted} no longer exists; mpo_megatron.device must follow this version of torch")
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
        # The distributed optimizer sorts parameters by 'torch.cuda.FloatTensor' and the like.
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_name


def _import_transformer_engine() -> None:
    """Import Transformer Engine first, where it is installed: Megatron-Core tolerates no other failure of it than ImportError.

    After an ImportError Megatron-Core runs without it, as it may on a machine without a GPU; with a GPU `mpo train` refuses then
    (stack/checks.py).
    """
    if not is_installed():
        return
    error = import_error(TRANSFORMER_ENGINE)
    if error is None or error.startswith(("ImportError:", "ModuleNotFoundError:")):
        return
    package = importlib.util.find_spec("transformer_engine")
    where = os.path.dirname(package.origin) if package is not None and package.origin else "transformer_engine"
    raise ConfigError(
        f"{where}: {diagnose('transformer-engine', error)}; without it: pip uninstall transformer-engine "
        "transformer-engine-torch transformer-engine-cu12 transformer-engine-cu13."
    )


def _prepare_megatron() -> None:
    with _quiet_imports(), _eager_imports():
        _import_transformer_engine()
        from megatron.core import jit
        from megatron.core.tensor_parallel import layers, random
        from megatron.core.transformer.moe import token_dispatcher
    jit.disable_jit_fuser()  # for the modules that are imported later
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        if not hasattr(random, name):
            raise AttributeError(f"megatron.core.tensor_parallel.random.{name} no longer exists; mpo_megatron.device must follow")
    # Its check that forked GPU randomness leaves the CPU's alone cannot hold where the CPU stands for the GPU.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    if not hasattr(token_dispatcher, "maybe_move_tensor_to_cpu"):
        raise AttributeError(
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu no longer exists; mpo_megatron.device must "
            "follow"
        )
    # NVIDIA's apex adds weight gradients to Megatron's buffer inside the GEMM, and so does PyTorch.
    if not hasattr(layers, "_grad_accum_fusion_available"):
        raise AttributeError(
            "megatron.core.tensor_parallel.layers._grad_accum_fusion_available no longer exists; mpo_megatron.device must follow"
        )
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add_weight_gradient)
    layers._grad_accum_fusion_available = True
    # Counts of tokens that come from a GPU become numpy arrays, which all-to-all takes; from a CPU they would stay tensors.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and tensor is not None else tensor
    )


def _add_weight_gradient(inputs: torch.Tensor, grad_outputs: torch.Tensor, total: torch.Tensor) -> None:
    """total += grad_outputsᵀ @ inputs, [out, in] in float32."""
    if inputs.dtype is total.dtype:
        total.addmm_(grad_outputs.T, inputs)
    else:
        total += grad_outputs.T @ inputs


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    # "No CUDA runtime is found": that nvcc is there without a GPU is no news.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@contextlib.contextmanager
def _eager_imports() -> Iterator[None]:
    """Modules imported here compile none of their functions, nor import the compiler, which takes a second: compiling tiny
    fused operations costs a CPU run more than it gains."""
    original = torch.compile
    torch.compile = lambda model=None, **options: model or (lambda function: function)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = original

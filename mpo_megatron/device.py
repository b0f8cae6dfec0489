"""GPU or CPU: the only module that distinguishes them.

Megatron-Core hard-codes CUDA (device "cuda", `torch.cuda.current_device()`, streams, RNG state, tensor type names). On a machine
without a GPU, `prepare()` replaces exactly these names, so that the same model, schedules, optimizer and checkpoints run on the
CPU over gloo. With a GPU it does nothing. Call it before importing `megatron.core`.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.metadata
import importlib.util
import logging
import os
import resource
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
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
"""Oldest nvidia-resiliency-ext with which Megatron-Core can be imported; it may also be absent."""

MEANINGLESS = (
    "Apex is not installed. Falling back to Torch Norm",  # norms come from Transformer Engine or model/layers.py
    "If you are using transformer_engine as the transformer implementation, the core_attn",  # the core is model/attention.py's
)
"""Prefixes of Megatron-Core's warnings that do not apply to this package's layers."""

DEPRECATIONS = {
    "megatron.core.distributed.distributed_data_parallel": "DistributedDataParallel: full_param_layout not provided",
    "megatron.core.dist_checkpointing.strategies.common": "load_common is deprecated",
    "megatron.core.dist_checkpointing.strategies.torch": "MCore's async save is deprecated",
}
"""Loggers of Megatron-Core, and prefixes of their deprecation messages, which only this package can act on."""
CHECKPOINT_READS = (
    "The argument order of load has been changed",
    "torch.distributed is disabled, unavailable or uninitialized",
)
"""Prefixes of torch's warnings when Megatron-Core reads checkpoints."""

NEEDLESS = ("absl", "tensorboard", "wandb")
"""Packages that Megatron-Core imports if installed; it does not need them on a CPU, and importing them takes a second."""

NEVER_COMPILED = ("add_param_group", "load_state_dict", "state_dict", "zero_grad")
"""Methods of torch's optimizers that import the compiler only to exclude themselves from compilation."""

COMPILED_VARIANTS = 64
"""Limit of compiled variants per function of `compile_for_any_length`."""

MALLOC_TRIM_THRESHOLD, MALLOC_NUMBER_OF_MAPS = -1, -4
"""Names of options in glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX."""

_CPU = torch.device("cpu")
_prepared = False


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


def distributed_backend() -> str:
    """Back end of `torch.distributed` for this device."""
    return "nccl" if has_gpu() else "gloo"


def select(local_rank: int) -> None:
    """Bind this process to its GPU; nothing to do on a CPU."""
    if has_gpu():
        # Some schedulers show each process only its own GPU (Slurm: --gpus-per-task).
        torch.cuda.set_device(local_rank if torch.cuda.device_count() > 1 else 0)


def synchronize() -> None:
    """Wait for queued kernels, so that a clock read afterwards is accurate."""
    if has_gpu():
        torch.cuda.synchronize()


def finish_computing() -> None:
    """Wait for kernels of this process's own stream, but not for communication, in which fast ranks wait for slow ones."""
    if has_gpu():
        torch.cuda.current_stream().synchronize()


def upload(values: np.ndarray[Any, Any] | torch.Tensor) -> torch.Tensor:
    """Copy host data to this process's device; for a GPU through pinned memory, without waiting for the copy."""
    tensor = torch.as_tensor(values)
    return tensor.pin_memory().to(device(), non_blocking=True) if has_gpu() else tensor


def compile_for_any_length(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function compiled once for all tensor lengths, and once more per dtype, option or gradient mode.

    Beyond PyTorch's limit of 8 variants, a call would silently run uncompiled, which may use the memory that compilation saves.
    The limit is raised, and exceeding it is an error.
    """
    import torch._dynamo.config as dynamo  # takes a second

    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if dynamo.cache_size_limit < COMPILED_VARIANTS:  # per thread: a GPU's backward passes have their own thread
            dynamo.cache_size_limit = COMPILED_VARIANTS
        return compiled(*args, **kwargs)

    return call


def keep_freed_memory() -> None:
    """On a CPU, reuse freed memory for the next tensors instead of returning it to the kernel.

    By default, glibc returns what a step frees, and the kernel clears each page before it is used again: a tenth of a step.
    Without effect if the user has set one of glibc's `MALLOC_…` variables.
    """
    libc = ctypes.CDLL(None)
    if has_gpu() or not hasattr(libc, "mallopt") or any(name.startswith("MALLOC_") for name in os.environ):
        return
    libc.mallopt(MALLOC_NUMBER_OF_MAPS, 0)  # large tensors, too, come from the heap
    libc.mallopt(MALLOC_TRIM_THRESHOLD, -1)  # whose end is never given back


def peak_memory_gib() -> float:
    """Peak memory of this process: allocated on the GPU, or resident on the CPU, in GiB."""
    if has_gpu():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB


def gpu_bytes() -> int | None:
    """Memory of this process's GPU; None on a CPU."""
    return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory) if has_gpu() else None


def gpu_name() -> str | None:
    """The GPU's name, such as `NVIDIA H100 80GB HBM3`; None on a CPU."""
    return torch.cuda.get_device_name() if has_gpu() else None


def prepare() -> None:
    """Make Megatron-Core importable and runnable on this machine; safe to call again.

    Raises:
        ConfigError: Transformer Engine is broken, or nvidia-resiliency-ext is too old, so importing Megatron-Core would fail.
    """
    global _prepared
    if _prepared:
        return
    _prepared = True
    # Read when Transformer Engine is imported. With power-of-2 scales, FP8's `current` recipe rounds a token in the same way
    # whatever else is in its row, except numbers 2^15 times smaller than the row's largest (docs/reference/fp8.md).
    os.environ.setdefault(POWER_OF_TWO_SCALES, "1")
    quiet_megatron()
    _check_resiliency_extension()
    # Megatron-Core uses names that torch will rename; a user cannot fix that.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed\..*")
    # NCCL groups are not bound to the GPU in advance: each of Megatron's would open a communicator, used or not.
    warnings.filterwarnings("ignore", message=r"barrier\(\): using the device")
    if has_gpu():
        _import_transformer_engine()
        return
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
    _prepare_megatron()


def _check_resiliency_extension() -> None:
    """Refuse a version of nvidia-resiliency-ext with which importing Megatron-Core fails, because it looks for newer names."""
    try:
        found = importlib.metadata.version("nvidia-resiliency-ext")
    except importlib.metadata.PackageNotFoundError:
        return
    if Version(found) < Version(RESILIENCY_EXTENSION):
        raise ConfigError(
            f"nvidia-resiliency-ext {found} is installed, but Megatron-Core cannot be imported with a version before "
            f"{RESILIENCY_EXTENSION}; remove it (pip uninstall nvidia-resiliency-ext), or install a newer one."
        )


def quiet_megatron() -> None:
    """Hide Megatron-Core's uninformative warnings. The main rank still shows one about lost speed."""
    for name, start in DEPRECATIONS.items():
        logging.getLogger(name).addFilter(functools.partial(_begins_otherwise, start))
    for message in CHECKPOINT_READS:
        warnings.filterwarnings("ignore", message=message, category=UserWarning)
    if not has_gpu() or os.environ.get("RANK", "0") != "0":  # on a CPU, they only report the missing GPU
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        return
    for message in MEANINGLESS:
        warnings.filterwarnings("ignore", message=message, module=r"megatron\..*")


def _begins_otherwise(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)


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
        # The distributed optimizer sorts parameters by type names such as 'torch.cuda.FloatTensor'.
        return original(self).replace("torch.", "torch.cuda.", 1)

    return type_name


def _import_transformer_engine() -> None:
    """Import Transformer Engine first, if installed: Megatron-Core tolerates only ImportError.

    After an ImportError, Megatron-Core runs without it, which is fine without a GPU; with a GPU, `mpo train` then refuses to
    start (stack/checks.py).
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
    with _quiet_imports(), _eager_imports(), _without(NEEDLESS):
        _import_transformer_engine()
        from megatron.core import jit
        from megatron.core.tensor_parallel import layers, random
        from megatron.core.transformer.moe import token_dispatcher
    jit.disable_jit_fuser()  # applies to modules imported later
    for name in ("_get_cuda_rng_state", "_set_cuda_rng_state"):
        if not hasattr(random, name):
            raise AttributeError(f"megatron.core.tensor_parallel.random.{name} no longer exists; mpo_megatron.device must follow")
    # Its check that forked GPU randomness leaves the CPU's unchanged cannot hold where the CPU replaces the GPU.
    logging.getLogger(random.__name__).setLevel(logging.ERROR)
    random._get_cuda_rng_state = lambda *args, **kwargs: torch.get_rng_state()
    random._set_cuda_rng_state = lambda state, *args, **kwargs: torch.set_rng_state(state)
    if not hasattr(token_dispatcher, "maybe_move_tensor_to_cpu"):
        raise AttributeError(
            "megatron.core.transformer.moe.token_dispatcher.maybe_move_tensor_to_cpu no longer exists; mpo_megatron.device must "
            "follow"
        )
    # NVIDIA's apex adds weight gradients to Megatron's buffer inside the GEMM; PyTorch can do the same.
    if not hasattr(layers, "_grad_accum_fusion_available"):
        raise AttributeError(
            "megatron.core.tensor_parallel.layers._grad_accum_fusion_available no longer exists; mpo_megatron.device must follow"
        )
    layers.fused_weight_gradient_mlp_cuda = SimpleNamespace(wgrad_gemm_accum_fp32=_add_weight_gradient)
    layers._grad_accum_fusion_available = True
    # Token counts from a GPU become numpy arrays, as all-to-all expects; from a CPU they would stay tensors.
    token_dispatcher.maybe_move_tensor_to_cpu = lambda tensor, as_numpy=False, record_stream=False: (
        tensor.numpy() if as_numpy and tensor is not None else tensor
    )


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

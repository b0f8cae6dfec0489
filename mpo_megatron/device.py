"""GPU or CPU: the only module that chooses between them. Megatron-Core's own choice, which is CUDA, is changed in `mcore`."""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

COMPILED_VARIANTS = 64
"""Limit of compiled variants per function of `compile_for_any_length`."""

MALLOC_TRIM_THRESHOLD, MALLOC_NUMBER_OF_MAPS = -1, -4
"""Names of options in glibc's malloc.h: M_TRIM_THRESHOLD, M_MMAP_MAX."""

BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16", "bf16")
"""Names in `torch.cpu.get_capabilities` of instructions for bfloat16 products: two of x86 processors, one of ARM's."""

_CPU = torch.device("cpu")


def has_gpu() -> bool:
    """Whether this process computes on a GPU."""
    return torch.cuda.is_available()


def device() -> torch.device:
    """The device of this process's tensors."""
    return torch.device("cuda", torch.cuda.current_device()) if has_gpu() else _CPU


def computes_bf16() -> bool:
    """Whether this process computes bfloat16 faster than float32: on any GPU, and on CPUs with instructions for it.

    Without them, products take up to eight times as long as in float32.
    """
    return has_gpu() or cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether the processor has instructions for bfloat16 products."""
    capabilities = torch.cpu.get_capabilities()
    return any(capabilities.get(name, False) for name in BF16_INSTRUCTIONS)


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
    if not _addresses_are_limited():
        _ask_for_large_pages(libc)


def _addresses_are_limited() -> bool:
    """Whether reserved addresses are missing elsewhere: by `ulimit`, or where the kernel counts them as memory in use."""
    limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_AS, resource.RLIMIT_DATA))
    if any(limit != resource.RLIM_INFINITY for limit in limits):
        return True
    policy = Path("/proc/sys/vm/overcommit_memory")
    return policy.is_file() and policy.read_text().strip() == "2"


def _ask_for_large_pages(libc: Any) -> None:
    """Extend the heap by half of the machine's memory, in addresses only, of which the kernel may use pages of 2 MiB.

    Without effect if there are not so many, or the kernel has no such pages. Its default is to use them only when asked.
    """
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    page = os.sysconf("SC_PAGE_SIZE")
    size = os.sysconf("SC_PHYS_PAGES") * page // 2 // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    start = libc.malloc(size)
    if start is not None:
        libc.madvise(-(-start // page) * page, size - page, mmap.MADV_HUGEPAGE)
        libc.free(start)


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

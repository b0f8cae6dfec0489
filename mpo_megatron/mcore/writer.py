"""The background writer of checkpoints: nvidia-resiliency-ext's if installed, else Megatron-Core's.

Both return a request with the same parts: functions that copy this rank's tensors to host memory, write them, and finish the
checkpoint once all ranks have written. Both are designed for a separate process; here a thread runs them, which ends with its
rank.
"""

from __future__ import annotations

import queue
import sys
from typing import Any

from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies import torch as strategies

Bucket = tuple[Any, str, tuple[list[Any], list[Any]]]
"""Content of one file: its path, its name, and (objects, tensors)."""


def choose_strategy() -> str:
    """Megatron-Core's name of the writer."""
    return "nvrx" if getattr(strategies, "HAVE_NVRX", False) else "mcore"


def keep_results_here(strategy: str) -> None:
    """Make the writer report to this process. By default it starts another process on each rank to hold a queue."""
    if strategy == "nvrx":
        from nvidia_resiliency_ext.checkpointing.async_ckpt import filesystem_async as module
    else:
        module = filesystem_async
    if not hasattr(module, "_results_queue"):
        raise AttributeError(f"{module.__name__}._results_queue no longer exists; mpo_megatron.mcore.writer must follow")
    module._results_queue = queue.Queue()


def stage(request: Any) -> list[Bucket]:
    """Copy this rank's tensors to host memory, so that training can continue; empty if this rank writes none."""
    return [] if request.async_fn is None else list(request.preload_fn())


def write_bucket(request: Any, index: int, bucket: Bucket) -> list[Any]:
    """Write one file and flush it to disk; return its entry in the checkpoint's metadata.

    Raises:
        OSError: the file cannot be written. (The writer's function for all files would hide the cause.)
    """
    transforms, _, *open_file = request.async_fn.args  # nvidia-resiliency-ext also passes a function that opens files
    writer = sys.modules[request.async_fn.func.__module__].FileSystemWriterAsync
    _, result = writer.write_preloaded_data(transforms, *open_file, index, bucket, None, None, True)
    if isinstance(result, Exception):
        raise result
    return list(result)


def report(request: Any, results: dict[int, list[Any]]) -> None:
    """Store what was written in the request, by file index; its `finalize_fns` read it."""
    if request.async_fn is not None:
        request.async_fn_args[2].put(results)

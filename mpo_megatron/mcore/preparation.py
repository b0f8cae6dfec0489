"""Make Megatron-Core importable, quiet, and runnable on this machine's device."""

from __future__ import annotations

import functools
import importlib.metadata
import logging
import os
import re
import warnings

from packaging.version import Version

from mpo_megatron import device
from mpo_megatron.config import ConfigError
from mpo_megatron.mcore import cpu
from mpo_megatron.stack.transformer_engine import import_transformer_engine

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
TORCH: tuple[tuple[type[Warning], str, str], ...] = (
    # Megatron-Core loads with its own sharded tensors, and passes the reader by position, as older versions of torch expect.
    (FutureWarning, "Please use DTensor instead", r"torch\.distributed\.checkpoint\."),
    (UserWarning, "The argument order of load has been changed", r"torch\.distributed\.checkpoint\."),
    # It makes each rank load on its own, which is meant.
    (UserWarning, "torch.distributed is disabled, unavailable or uninitialized", r"torch\.distributed\.checkpoint\."),
    # torch 2.14 renames these functions; Megatron-Core and older versions of torch know the old names only.
    (FutureWarning, "`torch.distributed.all_gather_into_tensor` is deprecated", r"torch\.distributed\."),
    (FutureWarning, "`torch.distributed.reduce_scatter_tensor` is deprecated", r"torch\.distributed\."),
    # NCCL groups are not bound to the GPU in advance: each of Megatron's would open a communicator, used or not.
    (UserWarning, "barrier(): using the device", r"torch\.distributed\."),
)
"""Categories, prefixes and modules of torch's warnings about Megatron-Core's calls, which a user cannot change."""

_prepared = False


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
    if device.has_gpu():
        import_transformer_engine()
        return
    cpu.replace_cuda()
    cpu.prepare_megatron()


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
    """Hide uninformative warnings of Megatron-Core, and of torch about its calls. The main rank still shows one about lost
    speed."""
    for name, start in DEPRECATIONS.items():
        logging.getLogger(name).addFilter(functools.partial(_begins_otherwise, start))
    for category, message, module in TORCH:
        warnings.filterwarnings("ignore", re.escape(message), category, module)
    if not device.has_gpu() or os.environ.get("RANK", "0") != "0":  # on a CPU, they only report the missing GPU
        warnings.filterwarnings("ignore", module=r"megatron\..*")
        return
    for message in MEANINGLESS:
        warnings.filterwarnings("ignore", message=message, module=r"megatron\..*")


def _begins_otherwise(start: str, record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(start)

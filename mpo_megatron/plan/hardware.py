"""GPUs and the networks of their machines: dense peaks, without sparsity.

Sources: NVIDIA's data sheets of A100 (2021), H100 (SXM5, 2023), H200 and GB200 NVL72 (2024), and the DGX A100, H100, H200 and
B200 user guides for NVLink and network adapters. Memory is CUDA's reported total, which is less than the nominal size.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from mpo_megatron.config import require
from mpo_megatron.train.throughput import PEAK_BF16_TFLOPS


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """One GPU, and its links to others."""

    name: str
    memory_gib: float
    """Total device memory, GiB."""
    bf16_tflops: float
    """Dense peak of bf16 matrix products, TFLOP/s."""
    fp8_tflops: float | None
    """Dense peak of FP8 matrix products, TFLOP/s; None if unsupported."""
    memory_gbps: float
    """Device memory bandwidth, GB/s."""
    intra_gbps: float
    """From one GPU to the others of its machine, GB/s per direction."""
    inter_gbps: float
    """From one GPU to other machines, GB/s per direction: one network adapter per GPU."""
    gpus_per_node: int = 8


_ROWS = (
    # name, GiB, FP8 TFLOP/s, then GB/s of memory, of NVLink and of the network adapter, GPUs that NVLink connects
    ("a100-40", 39.4, None, 1555, 300, 25, 8),
    ("a100", 79.2, None, 2039, 300, 25, 8),
    ("h100", 79.1, 1979, 3350, 450, 50, 8),
    ("h200", 139.8, 1979, 4800, 450, 50, 8),
    ("b200", 178.3, 4500, 8000, 900, 50, 8),
    ("gb200", 185.0, 5000, 8000, 900, 50, 72),
)
TABLE = {
    name: Hardware(
        name=name,
        memory_gib=memory,
        bf16_tflops=PEAK_BF16_TFLOPS[name.upper().removesuffix("-40")],
        fp8_tflops=fp8,
        memory_gbps=bandwidth,
        intra_gbps=intra,
        inter_gbps=inter,
        gpus_per_node=gpus,
    )
    for name, memory, fp8, bandwidth, intra, inter, gpus in _ROWS
}
"""Hardware by its value of `hardware`."""


def find_hardware(
    name: str,
    *,
    gpus_per_node: int | None = None,
    memory_gib: float | None = None,
    intra_gbps: float | None = None,
    inter_gbps: float | None = None,
) -> Hardware:
    """The hardware of this name, with overrides for the machines at hand.

    Raises:
        ConfigError: the name is unknown.
    """
    require(name.lower() in TABLE, f"hardware = {name}; there is no such entry; choose one of {', '.join(TABLE)}.")
    given = {
        "gpus_per_node": gpus_per_node,
        "memory_gib": memory_gib,
        "intra_gbps": intra_gbps,
        "inter_gbps": inter_gbps,
    }
    return dataclasses.replace(TABLE[name.lower()], **{field: value for field, value in given.items() if value is not None})  # type: ignore[arg-type]

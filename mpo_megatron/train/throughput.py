"""The speed of a step, and its share of the GPU's peak (model FLOPs utilization, MFU)."""

from __future__ import annotations

import torch

from mpo_megatron import device
from mpo_megatron.data.loader import StepBatch
from mpo_megatron.hf.flops import FlopModel

PEAK_BF16_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200": 989.0,
    "GH200": 989.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H800": 989.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L4": 121.0,
    "A10": 125.0,
    "A40": 150.0,
    "RTX A6000": 155.0,
    "RTX 6000 Ada": 364.0,
}
"""Dense bf16 rates of tensor cores in vendors' data sheets, 10^12 operations per second, by a part of the GPU's name."""


def peak_flops(gpu_name: str | None) -> float | None:
    """Nominal bf16 operations per second of this GPU; None for a CPU or an unlisted GPU.

    FP8 runs also use it, as is usual: their MFU then shows the gain of FP8.
    """
    words = set((gpu_name or "").replace("-", " ").split())
    fitting = [name for name in PEAK_BF16_TFLOPS if set(name.split()) <= words]
    return 1e12 * PEAK_BF16_TFLOPS[max(fitting, key=len)] if fitting else None


def throughput(flops: FlopModel, batch: StepBatch, seconds: float, precision: str) -> dict[str, float]:
    """Rates of a step over all ranks; FLOPs are the model's own, without recomputation."""
    pieces = [piece for rows in batch.plan.rows for row in rows for piece in row]
    scored = int(batch.table.scored_lengths[batch.in_rows].sum())
    pairs = sum(piece.num_pairs for piece in pieces)
    work = flops.train_step(tokens=batch.plan.num_tokens, pairs=pairs, scored=scored)
    per_rank = work / seconds / torch.distributed.get_world_size()
    peak = peak_flops(device.gpu_name()) if precision == "bf16" else None
    return {
        "tokens_per_second": batch.plan.num_tokens / seconds,
        "groups_per_second": len(batch.groups) / seconds,
        "tflops_per_rank": per_rank / 1e12,
        **({} if peak is None else {"mfu": per_rank / peak}),
        "seconds": seconds,
    }

"""Log-probs of tokens, forward and backward: the chunked kernel against full logits. Time, and peak memory beyond the inputs.

    python -m benchmarks.logprobs                # two CPU cores
    python -m benchmarks.logprobs --size 7b      # one GPU: 32k tokens × 152k vocabulary

On a CPU each measurement has a separate process, so that no side sees memory left by another. `kernel` and `full` return the
gradients of hidden states and weight, whose memory counts for both. `in place` is the kernel as the trainer uses it: the weight's
gradient is added to Megatron's existing gradient buffer, without memory of its own. Full logits are what a trainer without such a
kernel computes: logits = hidden · weightᵀ in float32, log_softmax, gather; several tensors of tokens × vocabulary. `products` is
the minimum of any kernel with recomputation: only the four matrix products of each chunk; comparing `in place` with it shows the
kernel's overhead. bf16 on a GPU, float32 on a CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import timing
from benchmarks.setup import SHAPES
from mpo_megatron import device
from mpo_megatron.config import ParallelConfig
from mpo_megatron.model.logprobs import Head, WeightGradient, add_product, vocab_parallel_statistics
from mpo_megatron.model.parallel import model_parallel

CHUNK = 1024
"""Minimum default of `model.logprob_chunk`; on a GPU the default depends on the memory."""
FULL_LIMIT = {"cpu": 6.0, "cuda": 100.0}
"""Memory limit of full logits, GiB; beyond it their side is not run, and its memory is extrapolated from the largest measured
one."""
FULL_COPIES = 4
"""Copies of tokens × vocabulary that full logits hold at their peak; used only for that limit."""
CASES = {
    "tiny": ((128, 512),),
    "small": ((1024, 151936), (2048, 151936), (32768, 151936), (2048, 16384), (4096, 16384), (16384, 16384), (32768, 16384)),
}
GPU_CASES = ((2048, 151936), (8192, 151936), (32768, 151936), (32768, 32768))
HIDDEN = {"tiny": 64, "small": 64}
"""Hidden channels of the CPU sizes: few, because the benchmark measures memory, and GEMMs grow with them."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every case in a separate process; or, with --worker, one."""
    parser = timing.build_parser(__doc__, list(SHAPES), repeat=1)
    parser.add_argument("--worker", nargs=4, metavar=("SIDE", "TOKENS", "VOCABULARY", "HIDDEN"), help="one measurement as JSON")
    options = timing.parse(parser, arguments)
    if options.worker:
        side, *sizes = options.worker
        print(json.dumps(run_side(side, *(int(size) for size in sizes))))
        return
    hidden = HIDDEN.get(options.size) or SHAPES[options.size]["hidden_size"]
    limit = FULL_LIMIT["cuda" if device.has_gpu() else "cpu"]

    def measure(case: tuple[int, int]) -> timing.Row:
        tokens, vocab_size = case
        row: timing.Row = {"tokens": tokens, "vocabulary": vocab_size, "hidden": hidden}
        for side in ("products", "in place", "kernel", "full"):
            if side == "full" and tokens * vocab_size * 4 * FULL_COPIES / 2**30 > limit:
                continue
            results = [spawn(side, tokens, vocab_size, hidden, options.threads) for _ in range(options.repeat)]
            row[side] = {name: timing.summarize([result[name] for result in results]) for name in ("seconds", "peak_mib")}
        return row

    rows = timing.measure_each("logprobs", options, CASES.get(options.size, GPU_CASES), measure)
    for row in rows:
        row["full_mib"], row["full_measured"] = full_memory(row, rows)
        # At the tiny size, memory that the allocator kept from the warm-up may be enough.
        row["memory_ratio"], row["in_place_ratio"] = (
            row[side]["peak_mib"]["median"] / row["full_mib"] if row["full_mib"] else None for side in ("kernel", "in place")
        )
        row["products_share"] = row["products"]["seconds"]["median"] / row["in place"]["seconds"]["median"]
    table = [
        {
            "tokens": row["tokens"],
            "vocabulary": row["vocabulary"],
            "in place, s": f"{row['in place']['seconds']['median']:.2f}",
            "kernel, s": f"{row['kernel']['seconds']['median']:.2f}",
            "full, s": f"{row['full']['seconds']['median']:.2f}" if "full" in row else "–",
            "products / in place, time": f"{row['products_share']:.0%}",
            "in place, MiB": f"{row['in place']['peak_mib']['median']:,.0f}",
            "kernel, MiB": f"{row['kernel']['peak_mib']['median']:,.0f}",
            "full, MiB": f"{row['full_mib']:,.0f}" + ("" if row["full_measured"] else " (extrapolated)"),
            "kernel / full, memory": _share(row["memory_ratio"]),
            "in place / full": _share(row["in_place_ratio"]),
        }
        for row in rows
    ]
    note = (
        "Forward + backward; memory is the peak beyond inputs, gradients included. Extrapolated: in proportion to tokens from "
        "the largest measured case of the same vocabulary."
    )
    timing.report("logprobs", options, {"hidden": hidden, "chunk": CHUNK, "dtype": str(dtype())}, rows, table, note)


def _share(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.1%}"


def dtype() -> torch.dtype:
    """Dtype of hidden states and weights."""
    return torch.bfloat16 if device.has_gpu() else torch.float32


def full_memory(row: timing.Row, rows: Sequence[timing.Row]) -> tuple[float, bool]:
    """MiB of full logits, and whether they were measured."""
    if "full" in row:
        return row["full"]["peak_mib"]["median"], True
    largest = max((r for r in rows if "full" in r and r["vocabulary"] == row["vocabulary"]), key=lambda r: r["tokens"])
    return largest["full"]["peak_mib"]["median"] * row["tokens"] / largest["tokens"], False


def spawn(side: str, tokens: int, vocab_size: int, hidden: int, threads: int) -> dict[str, float]:
    """One measurement; on a CPU in a new process."""
    if device.has_gpu():  # the allocator counts memory in use
        return run_side(side, tokens, vocab_size, hidden)
    command = [sys.executable, "-m", "benchmarks.logprobs", "--threads", str(threads), "--worker", side]
    sizes = [str(tokens), str(vocab_size), str(hidden)]
    result = subprocess.run([*command, *sizes], stdout=subprocess.PIPE, text=True, check=True)
    measured: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    return measured


def run_side(side: str, tokens: int, vocab_size: int, hidden: int) -> dict[str, float]:
    """Seconds and peak memory of one forward and backward pass."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"dtype": dtype(), "device": device.device()}
    inputs = torch.randn(tokens, hidden, **options).requires_grad_()
    weight = (0.02 * torch.randn(vocab_size, hidden, **options)).requires_grad_()
    targets = torch.randint(vocab_size, (tokens,), device=device.device())
    with model_parallel(ParallelConfig(), seed=0) as ranks:
        buffer = None
        if side in ("in place", "products"):
            buffer = torch.ones_like(weight, dtype=torch.float32)  # ones: memory that is really allocated

        def kernel(count: int) -> torch.Tensor:
            return vocab_parallel_statistics(
                Head(inputs[:count], weight),
                targets[:count],
                vocab_size=vocab_size,
                chunk=CHUNK,
                tp_group=ranks.tensor,
                gradient=None if buffer is None else WeightGradient(buffer, announce=False),
            ).logps

        def full(count: int) -> torch.Tensor:
            logits = (inputs[:count] @ weight.T).float()
            return logits.log_softmax(dim=-1).gather(1, targets[:count, None]).squeeze(1)

        compute: Callable[[int], torch.Tensor] = full if side == "full" else kernel

        def step(count: int) -> None:
            if side == "products":
                assert buffer is not None
                multiply(inputs[:count], weight, buffer)
            else:
                torch.autograd.grad(compute(count).sum(), (inputs, weight), allow_unused=buffer is not None)

        step(tokens if device.has_gpu() else 8)  # warm-up: libraries allocate buffers, kernels are compiled
        peak = PeakMemory()
        seconds = timing.clock(lambda: step(tokens))
        return {"seconds": seconds, "peak_mib": peak.mib()}


@torch.no_grad()
def multiply(inputs: torch.Tensor, weight: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
    """The kernel's matrix products over all chunks: logits forward, logits again, and both gradients."""
    for part in inputs.split(CHUNK):
        part @ weight.T
    gradient = torch.empty_like(inputs)
    for part, target in zip(inputs.split(CHUNK), gradient.split(CHUNK), strict=True):
        logits = part @ weight.T
        target.copy_(logits @ weight)
        add_product(buffer, logits.T, part)
    return gradient


class PeakMemory:
    """Peak memory in use since this object was created, beyond what was in use then."""

    def __init__(self) -> None:
        if device.has_gpu():
            torch.cuda.reset_peak_memory_stats()
            self.start = float(torch.cuda.memory_allocated())
        else:
            Path("/proc/self/clear_refs").write_text("5")  # Linux: reset the peak of resident memory
            self.start = _status("VmRSS")

    def mib(self) -> float:
        """MiB."""
        peak = float(torch.cuda.max_memory_allocated()) if device.has_gpu() else _status("VmHWM")
        return (peak - self.start) / 2**20


def _status(name: str) -> float:
    """A value from /proc/self/status, in bytes."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name + ":"))
    return float(line.split()[1]) * 1024


if __name__ == "__main__":
    main()

"""Environment variables for fast ranks on GPUs, set before CUDA reads them, however the rank was launched.

Variables set by the user stay. The values follow NVIDIA's performance recipes (Megatron-Bridge,
scripts/performance/perf_plugins.py), and of the libraries' own warnings.
"""

from __future__ import annotations

import os
import shutil
import subprocess

from mpo_megatron.config import TrainConfig

ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Variables from which PyTorch reads its allocator's options: the new name and the old one."""

FIRST_BLACKWELL = 10
"""Major compute capability from which communication and GEMMs overlap without a single queue."""


def set_environment(config: TrainConfig) -> dict[str, str]:
    """Set the recommended variables that are unset, and return them; the main rank prints them."""
    capability = compute_capability()
    if capability is None:
        return {}
    given = os.environ.keys()
    wanted = recommended(config, capability)
    if any(name in given for name in ALLOCATOR):
        wanted.pop(ALLOCATOR[0], None)
    chosen = {name: value for name, value in wanted.items() if name not in given}
    os.environ.update(chosen)
    if chosen and os.environ.get("RANK", "0") == "0":
        print("set for speed:", *(f"{name}={value}" for name, value in chosen.items()), flush=True)
    return chosen


def recommended(config: TrainConfig, capability: int) -> dict[str, str]:
    """Variables for a layout on GPUs of this major compute capability."""
    parallel = config.parallel
    found = {}
    if capability >= FIRST_BLACKWELL:
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "32"  # a queue per stream: otherwise streams wait for each other
    elif parallel.tensor > 1 or parallel.context > 1:
        # One queue keeps the host's order: communication starts before the GEMM that it overlaps with, which fills the GPU.
        found["CUDA_DEVICE_MAX_CONNECTIONS"] = "1"
    online = config.online
    if not (
        online.kl_weight and online.engine == "vllm" and online.vllm.gpus == "shared"
    ):  # vLLM's sleep mode does not support them
        found[ALLOCATOR[0]] = "expandable_segments:True"  # rows differ in length: fixed segments leave gaps
    if config.optimizer.overlap != "none":
        # Norms leave some processors to communication that runs beside them.
        found |= {"NVTE_FWD_LAYERNORM_SM_MARGIN": "16", "NVTE_BWD_LAYERNORM_SM_MARGIN": "16"}
    if parallel.pipeline > 1:
        found["NCCL_P2P_NET_CHUNKSIZE"] = str(2**21)  # activations between stages are large messages
    return found


def compute_capability() -> int | None:
    """Major compute capability of this machine's GPUs; None without GPUs. Asking PyTorch would initialize CUDA."""
    program = shutil.which("nvidia-smi")
    if program is None or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    command = [program, "--query-gpu=compute_cap", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        return int(float(done.stdout.split()[0]))
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):  # the driver does not answer: CUDA will report why
        return None

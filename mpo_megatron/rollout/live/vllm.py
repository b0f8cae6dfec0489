"""vLLM beside the training: an engine in a process of its own on the same GPU, its weights replaced before it samples.

Weights go to it through files in shared memory, a few at a time: a path is all that is sent by `collective_rpc`, so that nothing
has to be pickled, and any number of vLLM's workers reads them. Between two batches of samples the engine sleeps: the memory of
its weights and KV cache goes back to the training. Prefixes cached under old weights are forgotten.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from mpo_megatron.config import VllmConfig
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.engines.vllm_engine import VllmEngine

PART_BYTES = 2**30
"""Weights handed over together, at least."""
SHARED_MEMORY = Path("/dev/shm")
_OF_TRAINING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class LoadWeights:
    """Mixed into vLLM's workers (`worker_extension_cls`)."""

    model_runner: Any

    def load_weights_from(self, path: str) -> None:
        """Replace the weights that a safetensors file holds, under their Hugging Face names."""
        with safe_open(path, framework="pt") as file:
            self.model_runner.model.load_weights((name, file.get_tensor(name)) for name in file.keys())  # noqa: SIM118


class VllmLiveEngine:
    """A sleeping vLLM engine that takes new weights when it wakes (a `LiveEngine`)."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, dtype: torch.dtype, memory_fraction: float) -> None:
        """Start the engine without weights, on this rank's GPU.

        Args:
            folder: with config.json; weights are not read
            memory_fraction: share of the GPU's memory that vLLM takes while it samples
        Raises:
            ConfigError: vLLM is not installed, or refuses the model.
        """
        settings = VllmConfig(
            dtype="float32" if dtype == torch.float32 else "bfloat16",
            memory_fraction=memory_fraction,
            options={
                "load_format": "dummy",
                "enable_sleep_mode": True,
                "worker_extension_cls": f"{LoadWeights.__module__}.{LoadWeights.__name__}",
            },
        )
        with environment_of_an_engine():
            self.engine = VllmEngine(folder, tokenizer, settings)
        self.part: dict[str, Tensor] = {}
        self.asleep = False
        self._sleep()

    def receive(self, name: str, weight: Tensor) -> None:
        """Pass weights on whenever enough have come together."""
        if self.asleep:
            self.engine.engine.wake_up(["weights"])
            self.asleep = False
        self.part[name] = weight.detach().to("cpu", copy=True).contiguous()
        if sum(tensor.nbytes for tensor in self.part.values()) >= PART_BYTES:
            self._hand_over()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt, then sleep."""
        self._hand_over()
        self.engine.engine.wake_up(["kv_cache"])
        self.engine.engine.reset_prefix_cache()
        yield from self.engine.generate(prompts, sampling)
        self._sleep()

    def _sleep(self) -> None:
        self.engine.engine.sleep(level=2)  # weights need not be kept: others will come
        self.asleep = True

    def _hand_over(self) -> None:
        if not self.part:
            return
        with tempfile.TemporaryDirectory(dir=SHARED_MEMORY if SHARED_MEMORY.is_dir() else None) as folder:
            path = Path(folder) / "weights.safetensors"
            save_file(self.part, path)
            self.engine.engine.collective_rpc("load_weights_from", args=(str(path),))
        self.part = {}


@contextlib.contextmanager
def environment_of_an_engine() -> Iterator[None]:
    """Within it processes inherit this rank's GPU as their only one, and nothing that makes them part of the training.

    With torchrun's variables an engine would look for torchrun's rendezvous instead of opening its own.
    """
    before = dict(os.environ)
    local_rank = int(before.get("LOCAL_RANK", "0"))
    visible = before.get("CUDA_VISIBLE_DEVICES")
    for name in list(os.environ):
        if name in _OF_TRAINING or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[local_rank] if visible else str(local_rank)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

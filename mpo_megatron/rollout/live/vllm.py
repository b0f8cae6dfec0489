"""vLLM engines that a run starts: asleep on the ranks' own GPUs, or awake on GPUs that no rank has.

On shared GPUs the engine sleeps between two batches of samples: the memory of its weights and KV cache goes back to the training.
Weights arrive by CUDA IPC, or on GPUs of its own by NCCL (transfer.py). Prefixes cached under old weights are forgotten.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed import all_gather_object, barrier, get_world_size

from mpo_megatron.config import ConfigError, LiveVllmConfig, VllmConfig
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.engines.vllm_engine import VllmEngine
from mpo_megatron.rollout.live.transfer import LocalClient, choose_port, open_ipc, open_nccl
from mpo_megatron.rollout.live.weights import Weights

OWN_FRACTION = 0.9
"""Share of the memory that an engine takes of GPUs which nothing else uses."""
_OF_TRAINING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class VllmLiveEngine:
    """An engine that takes the policy's weights (a `LiveEngine`); every rank has one, those with `draws` ask it."""

    def __init__(self, weights: Weights, engine: VllmEngine | None, *, seconds: float, own_gpus: int = 0) -> None:
        """Agree with the engine on how weights travel; on shared GPUs, let it sleep. All ranks call it.

        Args:
            weights: the policy's
            engine: on the rank that asks it, without weights; None on the others
            seconds: what the engine may take for all weights
            own_gpus: how many GPUs it has that no rank has; 0 if it shares those of ranks
        Raises:
            ConfigError: vLLM is absent, has another interface, or its workers do not come.
        """
        self.engine, self.draws, self.shares_gpus = engine, engine is not None, own_gpus == 0
        client = None if engine is None else LocalClient(engine.engine, seconds)
        if self.shares_gpus:
            self.transfer = open_ipc(weights, client)
        else:
            port = 0 if client is None else choose_port()
            self.transfer = open_nccl(weights, client, address="127.0.0.1", port=port, workers=own_gpus)
        self._sleep()

    def update(self) -> None:
        """Give the engine the policy's current weights; all ranks call it."""
        if self.shares_gpus:
            torch.cuda.empty_cache()
            barrier()  # the engine may span the GPUs of several ranks: all have given back what they can
        if self.shares_gpus and self.engine is not None:
            self.engine.engine.wake_up(["weights"])
        self.transfer.send_weights()
        if self.shares_gpus and self.engine is not None:
            self.engine.engine.wake_up(["kv_cache"])
        if self.engine is not None:
            self.engine.engine.reset_prefix_cache()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt, then sleep."""
        assert self.engine is not None
        yield from self.engine.generate(prompts, sampling)
        self._sleep()

    def _sleep(self) -> None:
        if self.shares_gpus and self.engine is not None:
            self.engine.engine.sleep(level=2)  # weights need not be kept: others will come


def start_vllm(
    folder: Path,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    config: LiveVllmConfig,
    *,
    memory_fraction: float,
    gpus: Sequence[str],
) -> VllmEngine:
    """An engine without weights.

    Args:
        folder: with config.json; weights are not read
        memory_fraction: share of each GPU's memory that vLLM takes while it samples
        gpus: its GPUs, as CUDA_VISIBLE_DEVICES names them
    Raises:
        ConfigError: vLLM is not installed, or refuses the model.
    """
    shared = config.gpus == "shared"
    settings = VllmConfig(
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        tensor_parallel=config.tensor_parallel,
        pipeline_parallel=config.pipeline_parallel,
        memory_fraction=memory_fraction,
        options={
            "load_format": "dummy",
            "enable_sleep_mode": shared,
            "weight_transfer_config": {"backend": "ipc" if shared else "nccl"},
            "distributed_executor_backend": "mp",  # processes of their own: CUDA IPC does not work within one
            **config.options,
        },
    )
    with environment_of_an_engine(gpus, unpickles=shared):
        return VllmEngine(folder, tokenizer, settings)


def choose_gpus(config: LiveVllmConfig, *, draws: bool) -> list[str]:
    """The GPUs of this rank's engine, as CUDA_VISIBLE_DEVICES names them; all ranks call it, those without an engine get none.

    Shared GPUs are those of this rank and of the ranks behind it; own ones are dealt out behind those of this machine's ranks.

    Raises:
        ConfigError: this machine has fewer.
    """
    rank, local = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    there = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    asking = [draws]
    if get_world_size() > 1:
        asking = [False] * get_world_size()
        all_gather_object(asking, draws)
    if not draws:
        return []
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    number = config.tensor_parallel * config.pipeline_parallel
    if config.gpus == "shared":
        names = visible.split(",") if visible else [str(index) for index in range(there)]
        if local + number > there:
            raise ConfigError(
                f"online.vllm.tensor_parallel × pipeline_parallel = {number}: the engine of local rank {local} would need GPUs "
                f"of another machine; this one has {there} ranks. Choose a number of GPUs that divides them."
            )
        return names[local : local + number]
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    first = rank - local
    engines = sum(asking[first : first + there])
    if there + engines * number > len(names):
        raise ConfigError(
            f"online.vllm.gpus = own: this machine has {len(names)} GPUs, {there} for its ranks, and its {engines} engines of "
            f"{number} need {engines * number} more; start fewer ranks here, spread an engine over fewer GPUs, or set it "
            "to shared."
        )
    begin = there + number * sum(asking[first:rank])
    return names[begin : begin + number]


@contextlib.contextmanager
def environment_of_an_engine(gpus: Sequence[str], *, unpickles: bool) -> Iterator[None]:
    """Within it processes inherit these GPUs, and nothing that makes them part of the training.

    With torchrun's variables an engine would look for torchrun's rendezvous instead of opening its own.

    Args:
        unpickles: whether the engine's workers unpickle the IPC handles that this process sends them
    """
    before = dict(os.environ)
    for name in list(os.environ):
        if name in _OF_TRAINING or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    if unpickles:
        os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

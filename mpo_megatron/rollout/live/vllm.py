"""vLLM engines that a run starts: sleeping on the ranks' own GPUs, or awake on GPUs without ranks.

On shared GPUs the engine sleeps between batches of samples, which returns the memory of its weights and KV cache to training.
Weights arrive by CUDA IPC, or by NCCL on separate GPUs (transfer.py). Prefixes cached under old weights are dropped.
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
"""Share of GPU memory for an engine that has the GPUs to itself."""
_OF_TRAINING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class VllmLiveEngine:
    """An engine that receives the policy's weights (a `LiveEngine`); every rank has one, ranks with `draws` use it."""

    def __init__(self, weights: Weights, engine: VllmEngine | None, *, seconds: float, own_gpus: int = 0) -> None:
        """Agree with the engine on the weight transfer; on shared GPUs, put it to sleep. All ranks call it.

        Args:
            weights: the policy's weights
            engine: without weights, on the rank that calls it; None on the others
            seconds: time limit of an update
            own_gpus: number of GPUs that only the engine uses; 0 if it shares the ranks' GPUs
        Raises:
            ConfigError: vLLM is missing, has another interface, or its workers do not connect.
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
        """Send the policy's current weights to the engine; all ranks call it."""
        if self.shares_gpus:
            torch.cuda.empty_cache()
            barrier()  # the engine may span several ranks' GPUs: all must have freed their memory
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
            self.engine.engine.sleep(level=2)  # drop the weights: an update replaces them anyway


def start_vllm(
    folder: Path,
    tokenizer: Tokenizer,
    dtype: torch.dtype,
    config: LiveVllmConfig,
    *,
    memory_fraction: float,
    gpus: Sequence[str],
) -> VllmEngine:
    """Start an engine without weights.

    Args:
        folder: holds config.json; weights are not read
        memory_fraction: share of each GPU's memory that vLLM uses while it samples
        gpus: its GPUs, as in CUDA_VISIBLE_DEVICES
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
            "distributed_executor_backend": "mp",  # separate processes: CUDA IPC does not work within one
            **config.options,
        },
    )
    with environment_of_an_engine(gpus, unpickles=shared):
        return VllmEngine(folder, tokenizer, settings)


def choose_gpus(config: LiveVllmConfig, *, draws: bool) -> list[str]:
    """The GPUs of this rank's engine, as in CUDA_VISIBLE_DEVICES; all ranks call it, ranks without an engine get none.

    Shared GPUs are those of this rank and of the next ranks; separate GPUs come after those of this machine's ranks.

    Raises:
        ConfigError: this machine has too few GPUs.
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
                f"of another machine; this one has {there} ranks. Choose a number of GPUs that divides that."
            )
        return names[local : local + number]
    names = visible.split(",") if visible else [str(index) for index in range(torch.cuda.device_count())]
    first = rank - local
    engines = sum(asking[first : first + there])
    if there + engines * number > len(names):
        raise ConfigError(
            f"online.vllm.gpus = own: this machine has {len(names)} GPUs, {there} for its ranks; its {engines} engines of "
            f"{number} need {engines * number} more; start fewer ranks here, spread an engine over fewer GPUs, or set it "
            "to shared."
        )
    begin = there + number * sum(asking[first:rank])
    return names[begin : begin + number]


@contextlib.contextmanager
def environment_of_an_engine(gpus: Sequence[str], *, unpickles: bool) -> Iterator[None]:
    """Within this context, new processes inherit these GPUs, and none of torchrun's variables.

    With those, an engine would join torchrun's rendezvous instead of opening its own.

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

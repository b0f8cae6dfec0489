"""vLLM beside the training: a sleeping engine on the same GPUs, its weights replaced before it samples by vLLM's own update API.

    every rank   the policy's weights, whole, one after the other (`Weights`) → a buffer on its GPU, shared by CUDA IPC
    engine       each of its workers reads the buffer of the rank on its own GPU, and loads by the loaders of its model

Weights have the names and shapes of a checkpoint, so vLLM's loaders do what they do for one: fuse, cut for tensor and pipeline
parallelism, find the experts of every back end, quantise again (its layer-wise reload). No file is written.

Between two batches of samples the engine sleeps: the memory of its weights and KV cache goes back to the training. Prefixes
cached under old weights are forgotten.
"""

from __future__ import annotations

import base64
import contextlib
import os
import pickle
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed import barrier

from mpo_megatron.config import ConfigError, LiveVllmConfig, VllmConfig
from mpo_megatron.data.tokenizer import Tokenizer
from mpo_megatron.rollout.engines import Generation, Prompt, Sampling
from mpo_megatron.rollout.engines.vllm_engine import VllmEngine
from mpo_megatron.rollout.live.weights import Weights

LEAST_BUFFER_BYTES = 2**28
"""Weights travel together in a buffer of this size, or of the largest weight's."""
_OF_TRAINING = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


class VllmLiveEngine:
    """An engine that takes the policy's weights when it wakes (a `LiveEngine`); every rank has one, those with `draws` ask it."""

    def __init__(self, weights: Weights, engine: VllmEngine | None) -> None:
        """Agree with the engine on how weights travel, and let it sleep; all ranks call it.

        Args:
            weights: the policy's
            engine: on the rank that asks it, without weights; None on the others
        """
        self.engine, self.draws = engine, engine is not None
        self.transfer = open_transfer(weights, None if engine is None else engine.engine)
        self._sleep()

    def update(self) -> None:
        """Give the engine the policy's weights as they are now; all ranks call it."""
        torch.cuda.empty_cache()
        barrier()  # the engine may span the GPUs of several ranks: all have given back what they can
        if self.engine is not None:
            self.engine.engine.wake_up(["weights"])
        self.transfer.send_weights()
        if self.engine is not None:
            self.engine.engine.wake_up(["kv_cache"])
            self.engine.engine.reset_prefix_cache()

    def generate(self, prompts: Sequence[Prompt], sampling: Sampling) -> Iterator[Generation]:
        """Answer every prompt, then sleep."""
        assert self.engine is not None
        yield from self.engine.generate(prompts, sampling)
        self._sleep()

    def _sleep(self) -> None:
        if self.engine is not None:
            self.engine.engine.sleep(level=2)  # weights need not be kept: others will come


class _Client:
    """What vLLM's trainer side asks of an engine in this process (its `VLLMWeightSyncClient`)."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.engine.collective_rpc("init_weight_transfer_engine", kwargs={"init_info": init_info})

    def start_weight_update(self) -> None:
        self.engine.collective_rpc("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The handles name classes of torch's, which pass between processes as a pickle only, as in vLLM's own HTTP client."""
        pickled = base64.b64encode(pickle.dumps(update_info.pop("ipc_handles"))).decode()
        self.engine.collective_rpc("update_weights", kwargs={"update_info": update_info | {"ipc_handles_pickled": pickled}})

    def finish_weight_update(self) -> None:
        self.engine.collective_rpc("finish_weight_update")


def open_transfer(weights: Weights, engine: Any | None) -> Any:
    """vLLM's sender of weights by CUDA IPC, for this rank; all ranks call it, and later its `send_weights`.

    Args:
        engine: vLLM's engine, on the rank that asks it
    Raises:
        ConfigError: vLLM is absent, or has another interface.
    """
    try:
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
    except ImportError as error:
        raise ConfigError(
            f"online.engine = vllm needs vLLM with its update API for weights, which cannot be imported ({error}): pip install "
            "'mpo-megatron[rollout]', or set online.engine = transformers."
        ) from error

    class Source(WeightSource):
        @cached_property
        def metadata(self) -> list[Any]:
            return [ParamMeta(info.name, info.dtype, info.shape) for info in weights.metadata]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            return weights.stream()

    largest = max(torch.Size(info.shape).numel() * info.dtype.itemsize for info in weights.metadata)
    rank = 1 if engine is None else 0  # to vLLM, 0 is whoever speaks to an engine: here one rank of each replica
    settings = IPCTrainerInitInfo(rank=rank, packed=True, packed_buffer_size_bytes=max(largest, LEAST_BUFFER_BYTES))
    return IPCTrainerWeightTransferEngine.trainer_init(settings, client=_Client(engine), source=Source())


def start_vllm(
    folder: Path, tokenizer: Tokenizer, dtype: torch.dtype, config: LiveVllmConfig, memory_fraction: float
) -> VllmEngine:
    """An engine without weights on this rank's GPU and those of the ranks behind it.

    Args:
        folder: with config.json; weights are not read
        memory_fraction: share of each GPU's memory that vLLM takes while it samples
    Raises:
        ConfigError: vLLM is not installed, or refuses the model.
    """
    settings = VllmConfig(
        dtype="float32" if dtype == torch.float32 else "bfloat16",
        tensor_parallel=config.tensor_parallel,
        pipeline_parallel=config.pipeline_parallel,
        memory_fraction=memory_fraction,
        options={
            "load_format": "dummy",
            "enable_sleep_mode": True,
            "weight_transfer_config": {"backend": "ipc"},
            "distributed_executor_backend": "mp",  # processes of their own: CUDA IPC does not work within one
            **config.options,
        },
    )
    with environment_of_an_engine(config.tensor_parallel * config.pipeline_parallel):
        return VllmEngine(folder, tokenizer, settings)


@contextlib.contextmanager
def environment_of_an_engine(gpus: int) -> Iterator[None]:
    """Within it processes inherit this rank's GPU and the next ones, and nothing that makes them part of the training.

    With torchrun's variables an engine would look for torchrun's rendezvous instead of opening its own.

    Raises:
        ConfigError: this machine's ranks have fewer GPUs behind this one's.
    """
    before = dict(os.environ)
    local_rank = int(before.get("LOCAL_RANK", "0"))
    there = int(before.get("LOCAL_WORLD_SIZE", "1"))
    if local_rank + gpus > there:
        raise ConfigError(
            f"online.vllm.tensor_parallel × pipeline_parallel = {gpus}: the engine of local rank {local_rank} would need GPUs of "
            f"another machine; this one has {there} ranks. Choose a number of GPUs that divides them."
        )
    visible = before.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(there)]
    for name in list(os.environ):
        if name in _OF_TRAINING or name.startswith("TORCHELASTIC_"):
            del os.environ[name]
    os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(names[local_rank : local_rank + gpus])
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "1"
    os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # its workers unpickle the handles that this process sends them
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)

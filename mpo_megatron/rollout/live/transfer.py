"""Send the policy's weights to a vLLM engine through vLLM's own update API, without a file.

    IPC     each rank puts every full weight in a buffer on its GPU; each of the engine's workers reads the buffer on its own GPU
    NCCL    one rank sends every full weight to the engine's workers on other GPUs; the other ranks take part in gathering it

Weights have the names and shapes of a checkpoint. vLLM's loaders fuse them, shard them for tensor and pipeline parallelism,
find the experts of every back end, and quantise them again (layer-wise reload).
"""

from __future__ import annotations

import base64
import pickle
import random
import socket
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.config import ConfigError
from mpo_megatron.files import DataError
from mpo_megatron.rollout.live.weights import Weights

LEAST_BUFFER_BYTES = 2**28
"""Weights travel together in a buffer of this size, or of the largest weight's size."""
FIRST_PORT, FIRST_EPHEMERAL = 20_000, 32_768
"""Range to search for a free port: below the kernel's ephemeral ports."""


class EngineClient(Protocol):
    """The calls that vLLM's trainer side makes on an engine (its `VLLMWeightSyncClient`)."""

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""

    def start_weight_update(self) -> None:
        """Prepare for new weights."""

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights; return once they are loaded."""

    def finish_weight_update(self) -> None:
        """Switch to the new weights."""


class Transfer(Protocol):
    """A connection between the ranks and an engine."""

    def send_weights(self) -> None:
        """Replace the engine's weights with the policy's; all ranks call it."""


class LocalClient:
    """An engine in this process."""

    def __init__(self, engine: Any, seconds: float) -> None:
        """Store the engine; nothing is called yet.

        Args:
            engine: vLLM's `LLMEngine`
            seconds: time limit of a call to its workers
        """
        self.engine, self.seconds = engine, seconds

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer."""
        self._call("init_weight_transfer_engine", init_info=init_info)

    def start_weight_update(self) -> None:
        """Prepare for new weights."""
        self._call("start_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights. IPC handles contain torch classes, which pass between processes only as pickles."""
        if "ipc_handles" in update_info:
            pickled = base64.b64encode(pickle.dumps(update_info.pop("ipc_handles"))).decode()
            update_info = update_info | {"ipc_handles_pickled": pickled}
        self._call("update_weights", update_info=update_info)

    def finish_weight_update(self) -> None:
        """Switch to the new weights."""
        self._call("finish_weight_update")

    def _call(self, method: str, **arguments: Any) -> None:
        self.engine.collective_rpc(method, timeout=self.seconds, kwargs=arguments)


class WatchedClient:
    """A client that aborts a broadcast when the engine it waits for has failed."""

    def __init__(self, client: EngineClient) -> None:
        self.client = client
        self.failure: Exception | None = None
        self.abort: Callable[[], None] = lambda: None

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """Connect to the trainer; called in a thread, while the trainer waits for the workers."""
        self._watch(lambda: self.client.init_weight_transfer_engine(init_info))

    def start_weight_update(self) -> None:
        """Prepare for new weights."""
        self._watch(self.client.start_weight_update)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Receive weights; called in a thread, while the trainer sends."""
        self._watch(lambda: self.client.update_weights(update_info))

    def finish_weight_update(self) -> None:
        """Switch to the new weights."""
        self._watch(self.client.finish_weight_update)

    def _watch(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.failure = error
            self.abort()
            raise


class NcclTransfer:
    """vLLM's sender by NCCL, with errors that include the engine's own message."""

    def __init__(self, sender: Any, client: WatchedClient | None) -> None:
        """Wrap an open connection."""
        self.sender, self.client = sender, client
        if client is not None:
            client.abort = sender.shutdown

    def send_weights(self) -> None:
        """Replace the engine's weights with the policy's.

        Raises:
            DataError: the engine failed, or did not receive them in time.
        """
        device.synchronize()  # the caller's stream produces the weights, vLLM's sender reads them on another
        try:
            self.sender.send_weights()
        except Exception as error:
            cause = find_cause(error, self.client)
            raise DataError(
                f"online.engine: vLLM did not receive the policy's weights ({describe(cause)}); check the engine's log, then run "
                "the same command again to resume."
            ) from error


def open_ipc(weights: Weights, client: EngineClient | None) -> Transfer:
    """Open a connection to an engine on the ranks' own GPUs; all ranks call it.

    Args:
        client: on the rank that calls the engine; None on the others
    Raises:
        ConfigError: vLLM is missing, or has another interface.
    """
    try:
        from vllm.distributed.weight_transfer.ipc_engine import IPCTrainerInitInfo, IPCTrainerWeightTransferEngine
    except ImportError as error:
        raise absent(error) from error
    settings = IPCTrainerInitInfo(rank=_rank(client), packed=True, packed_buffer_size_bytes=buffer_bytes(weights))
    transfer: Transfer = IPCTrainerWeightTransferEngine.trainer_init(
        settings, client=client, source=_source(weights, wanted=True)
    )
    return transfer


def open_nccl(weights: Weights, client: EngineClient | None, *, address: str, port: int, workers: int) -> Transfer:
    """Open a connection to an engine on other GPUs; all ranks call it.

    Args:
        client: on the rank that sends; None on the others
        address: of this machine, reachable by the workers
        port: a free port on it
        workers: number of the engine's workers, one per GPU
    Raises:
        ConfigError: vLLM is missing or has another interface; or the engine does not connect.
    """
    try:
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine
    except ImportError as error:
        raise absent(error) from error
    settings = NCCLTrainerInitInfo(
        rank=_rank(client),
        master_address=address,
        master_port=port,
        world_size=1 + workers,
        packed=True,
        packed_buffer_size_bytes=buffer_bytes(weights),
    )
    watched = None if client is None else WatchedClient(client)
    source = _source(weights, wanted=client is not None)
    try:
        sender = NCCLTrainerWeightTransferEngine.trainer_init(settings, client=watched, source=source)
    except Exception as error:
        cause = find_cause(error, watched)
        raise ConfigError(
            f"online.engine: vLLM and this run could not connect at {address}:{port} for NCCL ({describe(cause)}); make "
            "sure that the engine can reach that address."
        ) from error
    return NcclTransfer(sender, watched)


def _rank(client: EngineClient | None) -> int:
    """Rank for vLLM's sender: 0 is the process that calls the engine."""
    return 1 if client is None else 0


def _source(weights: Weights, *, wanted: bool) -> Any:
    """The weights in the form that vLLM's trainer side accepts."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource

    class Source(WeightSource):
        @cached_property
        def metadata(self) -> list[Any]:
            return [ParamMeta(info.name, info.dtype, info.shape) for info in weights.metadata]

        def iter_full(self) -> Iterator[tuple[str, Tensor]]:
            for weight in weights.stream(wanted=wanted):
                device.finish_computing()  # vLLM's sender handles the next weight on another stream
                yield weight

    return Source()


def buffer_bytes(weights: Weights) -> int:
    """Size in bytes of the buffer in which weights travel together."""
    largest = max(torch.Size(info.shape).numel() * info.dtype.itemsize for info in weights.metadata)
    return max(largest, LEAST_BUFFER_BYTES)


def absent(error: ImportError) -> ConfigError:
    """The error for a missing vLLM update API."""
    return ConfigError(
        f"online.engine needs vLLM with its weight update API, but importing it failed ({error}): pip install "
        "'mpo-megatron[rollout]', or set online.engine = transformers."
    )


def find_cause(error: Exception, client: WatchedClient | None) -> Exception:
    """The failure of the engine that broke a connection, or `error` itself.

    Raises:
        ConfigError, DataError: the failure already has a message for the user.
    """
    cause = error if client is None or client.failure is None else client.failure
    if isinstance(cause, (ConfigError, DataError)):
        raise cause from None
    return cause


def describe(error: BaseException) -> str:
    """An error's type and the first line of its message."""
    said = str(error).strip().splitlines()
    return f"{type(error).__name__}: {said[0][:300]}" if said else type(error).__name__


def choose_port() -> int:
    """A free port below the kernel's ephemeral ports."""
    limits = Path("/proc/sys/net/ipv4/ip_local_port_range")
    first = int(limits.read_text(encoding="ascii").split()[0]) if limits.is_file() else FIRST_EPHEMERAL
    ports = range(FIRST_PORT, first) if first > FIRST_PORT else range(1024, first)
    for port in random.sample(ports, min(64, len(ports))):
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
            except OSError:
                continue
            return port
    raise ConfigError(
        f"online.engine: none of 64 ports between {ports[0]} and {ports[-1]} is free for the weight transfer; free one."
    )

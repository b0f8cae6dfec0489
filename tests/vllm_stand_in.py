"""vLLM's side of a live engine, on a CPU and without vLLM, with the names that tools/vllm_names.py finds in its sources.

The buffer that CUDA IPC would share is a file in shared memory. As in vLLM it is exported once an update and used again for every
chunk, so that a worker that kept a view of it would see later chunks. What NCCL would broadcast goes through a TCPStore, at the
address and port at which vLLM's two sides would meet; tools/vllm_transfer.py does the same with vLLM's own classes.
"""

from __future__ import annotations

import base64
import pickle
import queue
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from tests.waiting import TIMEOUT

MEET_SECONDS = TIMEOUT
"""How long sender and workers wait for each other, in seconds."""


@dataclass(frozen=True)
class ParamMeta:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]


class WeightSource:
    def __init_subclass__(cls) -> None:
        assert isinstance(cls.__dict__["metadata"], cached_property)  # vLLM refuses any other


@dataclass
class IPCTrainerInitInfo:
    packed: bool = False
    packed_buffer_size_bytes: int = 2**30
    rank: int = field(kw_only=True)


class IPCTrainerWeightTransferEngine:
    """Sends all weights of a source in chunks; every rank shares a buffer, the sender tells the engine where all are."""

    def __init__(self, info: IPCTrainerInitInfo, client: Any, source: Any) -> None:
        assert info.packed
        self.info, self.client, self.source = info, client, source
        self.sends = info.rank == 0

    @classmethod
    def trainer_init(
        cls, init_info: IPCTrainerInitInfo, *, client: Any, source: Any | None = None
    ) -> IPCTrainerWeightTransferEngine:
        engine = cls(init_info, client, source)
        if engine.sends:
            client.init_weight_transfer_engine({"packed": init_info.packed})
        return engine

    def send_weights(self) -> None:
        if self.sends:
            self.client.start_weight_update()
        with tempfile.NamedTemporaryFile(dir="/dev/shm") as file:
            size = self.info.packed_buffer_size_bytes
            file.truncate(size)
            buffer = torch.from_file(file.name, shared=True, size=size, dtype=torch.uint8)
            chunk: list[tuple[str, Tensor]] = []
            for name, tensor in self.source.iter_full():
                if chunk and sum(each.nbytes for _, each in chunk) + tensor.nbytes > size:
                    self._send(chunk, buffer, file.name)
                    chunk = []
                chunk.append((name, tensor))
            self._send(chunk, buffer, file.name)
        if self.sends:
            self.client.finish_weight_update()

    def _send(self, chunk: list[tuple[str, Tensor]], buffer: Tensor, path: str) -> None:
        parts = [tensor.contiguous().view(-1).view(torch.uint8) for _, tensor in chunk]
        torch.cat(parts, out=buffer[: sum(map(len, parts))])
        handles = [{f"GPU {dist.get_rank() if dist.is_initialized() else 0}": (path, len(buffer))}]
        if dist.is_initialized():
            dist.all_gather_object(everyone := [None] * dist.get_world_size(), handles[0])
            handles = everyone  # type: ignore[assignment]
        if self.sends:
            self.client.update_weights(
                {
                    "names": [name for name, _ in chunk],
                    "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in chunk],
                    "shapes": [list(tensor.shape) for _, tensor in chunk],
                    "ipc_handles": {gpu: handle for each in handles for gpu, handle in each.items()},
                    "ipc_handles_pickled": None,
                    "tensor_sizes": [len(part) for part in parts],
                }
            )
        if dist.is_initialized():
            dist.barrier()


@dataclass
class NCCLTrainerInitInfo:
    master_address: str
    master_port: int
    world_size: int
    packed: bool = True
    packed_buffer_size_bytes: int = 2**30
    rank: int = field(kw_only=True)


class NCCLTrainerWeightTransferEngine:
    """Sends all weights of a source from one rank, which waits for the workers until it is shut down."""

    def __init__(self, info: NCCLTrainerInitInfo, client: Any, source: Any) -> None:
        self.info, self.client, self.source = info, client, source
        self.sends, self.sent, self.over = info.rank == 0, 0, False
        self.known: list[ParamMeta] = []

    @classmethod
    def trainer_init(
        cls, init_info: NCCLTrainerInitInfo, *, client: Any, source: Any | None = None
    ) -> NCCLTrainerWeightTransferEngine:
        engine = cls(init_info, client, source)
        if engine.sends:
            info = {"master_address": init_info.master_address, "master_port": init_info.master_port, "rank_offset": 1}
            info |= {"world_size": init_info.world_size, "packed": init_info.packed}
            with ThreadPoolExecutor(1) as pool:
                called = pool.submit(client.init_weight_transfer_engine, info)
                engine.store = meet(info, is_master=True)
                called.result()
        return engine

    def send_weights(self) -> None:
        meta = self.source.metadata
        if not self.sends:
            assert list(self.source.iter_full()) == []  # this rank only takes part in the gathering
            return
        fields = {"names": [each.name for each in meta], "shapes": [list(each.shape) for each in meta]}
        fields |= {"dtype_names": [str(each.dtype).removeprefix("torch.") for each in meta]}
        self.client.start_weight_update()
        pool = ThreadPoolExecutor(1)
        called = pool.submit(self.client.update_weights, {} if meta == self.known else fields)
        for expected, (name, tensor) in zip(meta, self.source.iter_full(), strict=True):
            assert (name, tensor.dtype, tuple(tensor.shape)) == (expected.name, expected.dtype, tuple(expected.shape))
            self.store.set(f"{self.sent}", base64.b64encode(pickle.dumps(tensor)).decode())
            for worker in range(1, self.info.world_size):
                while not self.over and not self.store.check([f"{self.sent}/{worker}"]):
                    time.sleep(0.001)
            self.sent += 1
        called.result()
        pool.shutdown(wait=False)
        self.client.finish_weight_update()
        self.known = meta

    def shutdown(self) -> None:
        self.over = True


def meet(info: dict[str, Any], *, is_master: bool) -> dist.TCPStore:
    """The address at which sender and workers connect."""
    limit = timedelta(seconds=MEET_SECONDS)
    return dist.TCPStore(info["master_address"], info["master_port"], info["world_size"], is_master, timeout=limit)


class Worker:
    """A vLLM worker process: it records the input of its model's loaders."""

    def __init__(self, gpu: str, rank: int = 0) -> None:
        self.gpu, self.rank, self.packed, self.active, self.fails = gpu, rank, False, False, False
        self.loaded: dict[str, Tensor] = {}
        self.store: dist.TCPStore | None = None
        self.received, self.known = 0, {}  # type: ignore[var-annotated]

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        self.packed = init_info["packed"]
        if "master_address" in init_info:
            self.store = meet(init_info, is_master=False)
            self.rank += init_info["rank_offset"]

    def start_weight_update(self) -> None:
        assert not self.active
        self.active, self.loaded = True, {}

    def update_weights(self, update_info: dict[str, Any]) -> None:
        assert self.active
        assert self.packed
        if self.fails:
            raise RuntimeError("CUDA out of memory")
        if self.store is not None:
            self.known = update_info or self.known
            for name, shape, kind in zip(*(self.known[field] for field in ("names", "shapes", "dtype_names")), strict=True):
                self.loaded[name] = pickle.loads(base64.b64decode(self.store.get(f"{self.received}")))
                assert (list(self.loaded[name].shape), self.loaded[name].dtype) == (shape, getattr(torch, kind))
                self.store.set(f"{self.received}/{self.rank}", "taken")
                self.received += 1
            return
        assert update_info.get("ipc_handles") is None  # classes of torch's would need a pickle of their own on the way
        handles = pickle.loads(base64.b64decode(update_info["ipc_handles_pickled"]))
        path, size = handles[self.gpu]
        parts = torch.from_file(path, shared=True, size=size, dtype=torch.uint8)[: sum(update_info["tensor_sizes"])]
        names, shapes, types = update_info["names"], update_info["shapes"], update_info["dtype_names"]
        for name, shape, kind, part in zip(names, shapes, types, parts.split(update_info["tensor_sizes"]), strict=True):
            assert name not in self.loaded
            self.loaded[name] = part.clone().view(getattr(torch, kind)).view(shape)

    def finish_weight_update(self) -> None:
        assert self.active
        self.active = False


class Engine:
    """`LLMEngine`, limited to weights."""

    def __init__(self, gpus: int = 1) -> None:
        self.workers = [Worker(f"GPU {index}", index) for index in range(gpus)]
        self.calls: list[str] = []
        self.awake = {"weights", "kv_cache"}

    def collective_rpc(self, method: str, timeout: float | None = None, args: tuple[Any, ...] = (), kwargs: Any = None) -> None:
        self.calls.append(method)
        assert method == "init_weight_transfer_engine" or "weights" in self.awake
        outcomes: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

        def call(worker: Worker) -> None:
            try:
                getattr(worker, method)(*args, **(kwargs or {}))
                outcomes.put(None)
            except Exception as error:  # noqa: BLE001 - carried over to the thread that asked
                outcomes.put(error)

        for worker in self.workers:  # in parallel: they may wait for each other, forever if one fails
            threading.Thread(target=call, args=(worker,), daemon=True).start()
        for _ in self.workers:
            if (failure := outcomes.get()) is not None:
                raise failure

    def wake_up(self, tags: list[str] | None = None) -> None:
        self.calls.append(f"wake {tags}")
        self.awake |= set(tags or ())

    def sleep(self, level: int = 1) -> None:
        self.calls.append(f"sleep {level}")
        self.awake = set()

    def reset_prefix_cache(self) -> bool:
        self.calls.append("reset")
        return True


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the stand-in under vLLM's module names."""
    for name, module in modules():
        monkeypatch.setitem(sys.modules, name, module)


def modules() -> Iterator[tuple[str, ModuleType]]:
    """vLLM's modules that a live engine imports."""
    contents = {
        "": (),
        ".distributed": (),
        ".distributed.weight_transfer": (),
        ".distributed.weight_transfer.base": (ParamMeta, WeightSource),
        ".distributed.weight_transfer.ipc_engine": (IPCTrainerInitInfo, IPCTrainerWeightTransferEngine),
        ".distributed.weight_transfer.nccl_engine": (NCCLTrainerInitInfo, NCCLTrainerWeightTransferEngine),
    }
    for name, members in contents.items():
        module = ModuleType(f"vllm{name}")
        for member in members:
            setattr(module, member.__name__, member)
        yield module.__name__, module

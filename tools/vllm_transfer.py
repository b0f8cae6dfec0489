"""Pass weights between vLLM's own trainer and worker classes by its NCCL back end, on CPUs.

    python -m tools.vllm_transfer FOLDER…    folders that have `vllm`: an installed environment's, or an unpacked wheel
    python -m tools.vllm_transfer            the newest version for a live engine, downloaded (0.3 GB)

rollout/live/transfer.py drives vLLM's sender in this process, and vLLM's receivers run in threads. Real are both ends of the
back end, their packing and their messages. Stand-ins are NCCL itself (a TCPStore passes the bytes), the model, and what vLLM
imports around.
"""

from __future__ import annotations

import base64
import contextlib
import datetime
import importlib
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.config import ConfigError
from mpo_megatron.files import DataError
from mpo_megatron.mcore.preparation import prepare
from mpo_megatron.model.live_weights import WeightInfo
from mpo_megatron.rollout.live import transfer
from tools.package_names import check
from tools.vllm_names import VERSIONS

BACK_END = "vllm.distributed.weight_transfer"
SECONDS = 20
CHECKS = ("two updates to two workers", "a worker that fails ends the broadcast", "no worker comes")


class Communicator:
    """`PyNcclCommunicator` over the store that both sides met at."""

    def __init__(self, group: SimpleNamespace, device: Any) -> None:
        self.group, self.count, self.disabled = group, 0, False

    def broadcast(self, tensor: Tensor, src: int, stream: Any = None) -> None:
        """Send, or wait for, the next tensor; the sender waits for all receivers, as NCCL would."""
        store, key = self.group.store, f"{self.count}"
        self.count += 1
        if self.group.rank == src:
            store.set(key, base64.b64encode(tensor.contiguous().view(torch.uint8).numpy().tobytes()).decode())
            for rank in range(1, self.group.world_size):
                while not self.disabled and not store.check([f"{key}/{rank}"]):
                    threading.Event().wait(0.001)
            return
        tensor.copy_(torch.frombuffer(bytearray(base64.b64decode(store.get(key))), dtype=torch.uint8))
        store.set(f"{key}/{self.group.rank}", "taken")

    def destroy(self) -> None:
        """Let nobody wait any more."""
        self.disabled = True


def meet(host: str, port: int, rank: int, world_size: int) -> SimpleNamespace:
    """`StatelessProcessGroup.create`."""
    limit = datetime.timedelta(seconds=SECONDS / 4)
    store = torch.distributed.TCPStore(host, port, world_size, is_master=rank == 0, timeout=limit)  # type: ignore[attr-defined]
    return SimpleNamespace(store=store, rank=rank, world_size=world_size)


class Model:
    """A worker's model: it keeps what its loader is given."""

    def __init__(self) -> None:
        self.loaded: dict[str, Tensor] = {}

    def load_weights(self, weights: Sequence[tuple[str, Tensor]]) -> None:
        """Keep copies: vLLM uses its buffers again."""
        self.loaded |= {name: weight.clone() for name, weight in weights}


class Engine:
    """What `LLMEngine.collective_rpc` reaches: workers that hold vLLM's receiver."""

    def __init__(self, number: int) -> None:
        receiver = importlib.import_module(f"{BACK_END}.nccl_engine").NCCLWeightTransferEngine
        self.models = [Model() for _ in range(number)]
        parallel = [SimpleNamespace(data_parallel_index=0, world_size=number, rank=rank) for rank in range(number)]
        configs = [SimpleNamespace(parallel_config=each, model_config=None) for each in parallel]
        cpu = torch.device("cpu")
        self.workers = [receiver(None, config, cpu, model) for config, model in zip(configs, self.models, strict=True)]
        self.absent = self.failing = False

    def collective_rpc(self, method: str, timeout: float | None = None, kwargs: Any = None) -> None:
        """Call a method of all workers, each in a thread as in a process of its own."""
        if self.absent:
            raise RuntimeError("the workers are gone")
        failures: list[Exception] = []

        def call(worker: Any) -> None:
            try:
                self._call(worker, method, **kwargs)
            except Exception as error:  # noqa: BLE001 - carried over to the thread that called
                failures.append(error)

        threads = [threading.Thread(target=call, args=(worker,), daemon=True) for worker in self.workers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SECONDS)
            if failures:
                raise failures[0]

    def _call(self, worker: Any, method: str, init_info: Any = None, update_info: Any = None) -> None:
        if method == "init_weight_transfer_engine":
            worker.init_transfer_engine(worker.parse_init_info(init_info))
        elif method == "update_weights":
            if self.failing:
                raise RuntimeError("out of memory")
            worker.update_weights(update_info)
        else:
            getattr(worker, method)()


class Policy:
    """A policy's weights: some, of two types, that take several buffers."""

    def __init__(self) -> None:
        self.now = {f"layers.{index}.weight": torch.zeros(30, 7, dtype=torch.bfloat16) for index in range(5)}
        self.now["router.weight"] = torch.zeros(11, 3)

    @property
    def metadata(self) -> list[WeightInfo]:
        """As `LiveWeights`."""
        return [WeightInfo(name, tuple(tensor.shape), tensor.dtype) for name, tensor in self.now.items()]

    def stream(self, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        """As `LiveWeights`."""
        yield from ((name, tensor.clone()) for name, tensor in self.now.items())


def install(root: Path) -> None:
    """Make vLLM's back end importable from a folder, without what it needs of GPUs."""
    prepare()
    for name in [name for name in sys.modules if name.partition(".")[0] == "vllm"]:
        del sys.modules[name]
    contents: dict[str, dict[str, Any]] = {
        "vllm.config.parallel": {"ParallelConfig": object},
        "vllm.config.weight_transfer": {"WeightTransferConfig": object},
        "vllm.distributed.device_communicators.pynccl_wrapper": {"NCCL_UNIQUE_ID_BYTES": 128},
        "vllm.distributed.device_communicators.pynccl": {"PyNcclCommunicator": Communicator},
        "vllm.distributed.utils": {"StatelessProcessGroup": SimpleNamespace(create=meet)},
        "vllm.utils.nccl": {"unpinned_nccl_env": contextlib.nullcontext},
        "vllm.model_executor.model_loader.reload": {
            "initialize_layerwise_reload": lambda model: None,
            "finalize_layerwise_reload": lambda model, config: None,
        },
        "vllm.model_executor.model_loader.mtp_validation": {"disable_mtp_completeness_check": contextlib.nullcontext},
        "pybase64": vars(base64),
    }
    for name in (*contents, BACK_END):
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            module = sys.modules.setdefault(".".join(parts[:end]), ModuleType(".".join(parts[:end])))
            if end < len(parts):
                module.__path__ = [str(root.joinpath(*parts[:end]))]
        vars(sys.modules[name]).update(contents.get(name, {}))
    sys.modules[BACK_END].__path__ = [str(root.joinpath(*BACK_END.split(".")))]
    torch.accelerator.current_device_index = lambda: 0
    torch.accelerator.current_stream = torch.cuda.current_stream
    torch.accelerator.synchronize = lambda *arguments: None
    torch.Event = torch.cuda.Event  # type: ignore[misc]
    torch.Tensor.record_stream = lambda *arguments: None  # type: ignore[method-assign]


def failures(root: Path) -> list[str]:
    """What does not work with the vLLM in a folder, a line each."""
    install(root)
    transfer.LEAST_BUFFER_BYTES = 500  # a weight has 420 bytes: several chunks
    found = []
    policy, engine = Policy(), Engine(2)

    def open_transfer(engine: Any) -> transfer.Transfer:
        client = transfer.LocalClient(engine, SECONDS)
        return transfer.open_nccl(policy, client, address="127.0.0.1", port=transfer.choose_port(), workers=2)

    connection = open_transfer(engine)
    for value in (1.0, 2.0):
        for index, tensor in enumerate(policy.now.values()):
            tensor.fill_(value + index)
        connection.send_weights()
        for model in engine.models:
            if not all(torch.equal(model.loaded.get(name, tensor[:0]), tensor) for name, tensor in policy.now.items()):
                found.append(f"{CHECKS[0]}: a worker has other weights")
    engine.failing = True
    found += expect(CHECKS[1], connection.send_weights, "out of memory")
    absent = Engine(2)
    absent.absent = True
    found += expect(CHECKS[2], lambda: open_transfer(absent), "the workers are gone")
    return found


def expect(check: str, call: Any, text: str) -> list[str]:
    """Nothing if a call is refused with this reason, in time."""
    said: list[str] = []

    def run() -> None:
        try:
            call()
        except (DataError, ConfigError) as error:
            said.append(str(error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(SECONDS)
    return [] if said and text in said[0] else [f"{check}: {said or 'waits for ever'}"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check each folder or version; the exit code is 1 if something fails."""
    chosen = list(sys.argv[1:] if arguments is None else arguments) or [VERSIONS[-1]]
    if {"-h", "--help"} & set(chosen):
        print(__doc__)
        return 0
    return check("vllm", chosen, failures, f"passes all of {len(CHECKS)} checks")


if __name__ == "__main__":
    raise SystemExit(main())

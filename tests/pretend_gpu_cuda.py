"""The names that the pretend GPU (pretend_gpu.py) replaces: torch.cuda's, NCCL, and autograd's queries of CUDA."""

from __future__ import annotations

import ctypes
import functools
import os
import subprocess
import tempfile
import zlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch._dynamo  # looks at the names below torch.cuda before they are replaced
import torch.distributed as dist

GPU = torch.device("cuda", 0)
GIB = 2**30

generator = torch.Generator()
"""The GPU's own."""
gpu_generators: dict[int, torch.Generator] = {}
"""The GPU's generators, by address."""
nccl_groups: set[str] = set()
"""Names of the process groups that were requested as NCCL's and use gloo."""


def replace_names() -> None:
    """Install all replacements; torch's own names are gone until the process ends."""
    _build_guard()
    for dotted, value in _cuda_names().items():
        *parents, name = dotted.split(".")
        setattr(functools.reduce(getattr, parents, torch.cuda), name, value)
    torch.version.cuda = "13.0"  # type: ignore[attr-defined]
    torch.Generator = Generator  # type: ignore[misc]
    _replace_nccl()


class Generator(torch.Generator):
    """A generator, possibly the GPU's."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        made = super().__new__(cls)
        if torch.device(device).type == "cuda":
            gpu_generators[made._cdata] = made
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass


class Stream:
    """A stream or event: every operation has already finished."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.device = GPU

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Stream) -> float:
        return 1.0

    def record_event(self, event: Stream | None = None) -> Stream:
        return event or Stream()

    def synchronize(self, *args: Any) -> None:
        pass

    record = wait = wait_event = wait_stream = synchronize


def _cuda_names() -> dict[str, Any]:
    """Replacements for names below `torch.cuda`."""

    def nothing(*args: Any, **kwargs: Any) -> None:
        pass

    properties = SimpleNamespace(name="Pretend GPU", major=9, minor=0, total_memory=80 * GIB)
    stream = Stream()
    names = ("init", "_lazy_init", "set_device", "set_stream", "synchronize", "empty_cache", "ipc_collect")
    return {
        **dict.fromkeys((*names, "reset_peak_memory_stats", "nvtx.range_push", "nvtx.range_pop"), nothing),
        "_lazy_call": lambda call, **kwargs: call(),
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "get_device_properties": lambda *args: properties,
        "get_device_name": lambda *args: properties.name,
        "get_device_capability": lambda *args: (9, 0),
        **dict.fromkeys(("memory_allocated", "memory_reserved"), lambda *args: GIB),
        **dict.fromkeys(("max_memory_allocated", "max_memory_reserved"), lambda *args: 2 * GIB),
        "nccl.version": lambda: (2, 28, 9),
        "default_generators": (generator,),
        "manual_seed": generator.manual_seed,
        "manual_seed_all": generator.manual_seed,
        **dict.fromkeys(("get_rng_state", "random.get_rng_state"), lambda *args, **kwargs: generator.get_state()),
        **dict.fromkeys(("set_rng_state", "random.set_rng_state"), lambda state, *args, **kwargs: generator.set_state(state)),
        "Stream": Stream,
        "Event": Stream,
        "stream": lambda stream: stream or Stream(),
        "device": Stream,
        "current_stream": lambda *args: stream,
        "default_stream": lambda *args: stream,
    }


GUARD = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using namespace c10;
struct Hooks : at::CUDAHooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
struct Guard : impl::NoOpDeviceGuardImpl<DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return getDevice(); }
  Device getDevice() const override { return Device(DeviceType::CUDA, 0); }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, getDevice()); }
  Stream exchangeStream(Stream stream) const noexcept override { return stream; }
};
namespace c10::impl { C10_REGISTER_GUARD_IMPL(CUDA, Guard) }
static auto hooks = new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks;  // in the place of theirs
"""
"""CUDA queries of autograd that a torch without CUDA lacks: availability, current device and stream."""


def _build_guard() -> None:
    root = Path(torch.__file__).parent
    built = Path(tempfile.gettempdir()) / f"pretend_gpu_{os.getuid()}_{torch.__version__}_{zlib.crc32(GUARD.encode()):x}.so"
    if not built.exists() or built.stat().st_uid != os.getuid():  # compiled once, then shared by all processes of this user
        made = built.with_name(f"{built.name}.{os.getpid()}")  # renamed when complete: other processes may look for it meanwhile
        command = ["g++", "-std=c++20", "-shared", "-fPIC", "-x", "c++", "-", "-o", str(made), f"-I{root / 'include'}"]
        subprocess.run([*command, f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10"], input=GUARD, text=True, check=True)
        made.replace(built)
    ctypes.CDLL(str(built))


def _replace_nccl() -> None:
    c10d = dist.distributed_c10d
    new_group, object_device = c10d._new_process_group_helper, c10d._get_object_coll_device

    def make(size: int, rank: int, ranks: list[int], backend: Any, store: Any, *args: Any, **kwargs: Any) -> Any:
        nccl = str(backend) == "nccl"
        made = new_group(size, rank, ranks, c10d.Backend("gloo") if nccl else backend, store, *args, **kwargs)
        if nccl and isinstance(made[0], dist.ProcessGroup):
            nccl_groups.add(made[0].group_name)
            c10d._world.pg_map[made[0]] = ("nccl", c10d._world.pg_map[made[0]][1])
        return made

    def device_of(group: Any = None) -> str:
        return "cuda" if (group or c10d._get_default_group()).group_name in nccl_groups else object_device(group)

    c10d._new_process_group_helper = make
    c10d._get_object_coll_device = device_of
    c10d.is_nccl_available = dist.is_nccl_available = lambda: True

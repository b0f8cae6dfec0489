"""The choice of a device, and what depends on it."""

from __future__ import annotations

import functools
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo

from mpo_megatron import device


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpu_is_not_claimed() -> None:
    assert not torch.cuda.is_available()
    assert not device.has_gpu()
    assert device.distributed_backend() == "gloo"
    assert 0 < device.peak_memory_gib() < 1024


@pytest.mark.parametrize(
    ("capabilities", "fast"),
    [
        ({"architecture": "x86_64", "avx2": True, "avx512_bf16": False, "amx_bf16": False}, False),
        ({"architecture": "x86_64", "avx512_f": True, "avx512_bf16": True}, True),
        ({"architecture": "x86_64", "amx_bf16": True}, True),
        ({"architecture": "arm64", "neon": True, "bf16": False}, False),
        ({"architecture": "arm64", "neon": True, "bf16": True}, True),
    ],
)
def test_which_processors_compute_bfloat16(monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, Any], fast: bool) -> None:
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert device.computes_bf16() is fast
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    assert device.computes_bf16()


def test_compiled_once_for_all_lengths_and_never_silently_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    def scale(values: torch.Tensor, option: str) -> torch.Tensor:
        return values * len(option)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=keep))
    monkeypatch.setattr(device, "COMPILED_VARIANTS", 14)
    compiled = device.compile_for_any_length(scale)
    for length in (5, 9, 300, 2, 17):
        assert torch.equal(compiled(torch.ones(length), "a"), torch.ones(length))
    assert len(graphs) == 1
    with ThreadPoolExecutor(1) as elsewhere:  # PyTorch's own limit is 8 per thread
        list(elsewhere.map(lambda options: compiled(torch.ones(3), options * "a"), range(2, 15)))
    assert len(graphs) == 14
    with torch._dynamo.config.patch(recompile_limit=8), pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        compiled(torch.ones(3), "")


@pytest.mark.parametrize(("gpu", "given", "kept"), [(False, None, True), (True, None, False), (False, "MALLOC_ARENA_MAX", False)])
def test_freed_memory_is_kept_on_a_cpu_unless_the_user_sets_malloc(
    monkeypatch: pytest.MonkeyPatch, *, gpu: bool, given: str | None, kept: bool
) -> None:
    options: dict[int, int] = {}
    monkeypatch.setattr(device, "has_gpu", lambda: gpu)
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=options.__setitem__))
    monkeypatch.setattr(device, "_ask_for_large_pages", lambda libc: None)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    if given is not None:
        monkeypatch.setenv(given, "1")
    device.keep_freed_memory()
    assert options == ({device.MALLOC_NUMBER_OF_MAPS: 0, device.MALLOC_TRIM_THRESHOLD: -1} if kept else {})


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="the kernel has no large pages")
def test_the_heap_may_use_large_pages_and_takes_no_memory() -> None:
    code = """if True:
        import resource
        from pathlib import Path
        from mpo_megatron import device
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        device.keep_freed_memory()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
        found = Path("/proc/self/smaps").read_text().split("VmFlags:")
        print(any("[heap]" in area and " hg" in flags.splitlines()[0] for area, flags in zip(found, found[1:])))
    """
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    taken, large = done.stdout.split()
    assert large == "True"
    assert int(taken) < 8 * 1024  # KiB


@pytest.mark.parametrize(("limited", "policy", "reserved"), [(None, "0", 1), ("AS", "0", 0), ("DATA", "1", 0), (None, "2", 0)])
def test_where_addresses_are_scarce_none_are_reserved(
    monkeypatch: pytest.MonkeyPatch, limited: str | None, policy: str, reserved: int
) -> None:
    """`ulimit -v`, or a kernel that counts them: files could no longer be mapped, or processes forked."""
    scarce = None if limited is None else getattr(resource, f"RLIMIT_{limited}")
    limits = dict.fromkeys((resource.RLIMIT_AS, resource.RLIMIT_DATA), (resource.RLIM_INFINITY, 0)) | {scarce: (2**36, 0)}
    asked: list[Any] = []
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    monkeypatch.setattr(device.resource, "getrlimit", limits.__getitem__)
    monkeypatch.setattr(device.Path, "read_text", lambda path: f"{policy}\n")
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace(mallopt=lambda option, value: None))
    monkeypatch.setattr(device, "_ask_for_large_pages", asked.append)
    for name in [name for name in os.environ if name.startswith("MALLOC_")]:
        monkeypatch.delenv(name)
    device.keep_freed_memory()
    assert len(asked) == reserved


def test_without_addresses_to_reserve_pages_stay_small() -> None:
    calls: list[Any] = []

    def call(*arguments: Any) -> None:
        calls.append(arguments)

    libc = SimpleNamespace(malloc=lambda size: None, madvise=call, free=call)
    device._ask_for_large_pages(libc)
    assert calls == []


def test_without_glibc_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.ctypes, "CDLL", lambda name: SimpleNamespace())
    device.keep_freed_memory()

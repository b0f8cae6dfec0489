"""Compare several machines through torchrun's store: versions, drivers, GPUs and clocks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Protocol

from mpo_megatron.stack.problem import Problem

CLOCK_SECONDS = 1.0
"""Report clocks that differ by more: ages of files and locks on a shared disk are compared with the local clock."""

PINGS = 5


class Store(Protocol):
    """The part of `torch.distributed.Store` used here."""

    def set(self, key: str, value: str) -> None: ...

    def get(self, key: str) -> bytes: ...


def count_peers() -> int:
    """Number of machines that this doctor runs on: one, unless torchrun started it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def open_store(timeout: timedelta = timedelta(minutes=15)) -> tuple[Store, int, int]:
    """(store shared by all ranks, rank, number of ranks), from torchrun's environment."""
    from torch.distributed.rendezvous import rendezvous

    store, rank, size = next(rendezvous("env://", timeout=timeout))
    return store, rank, size


def exchange(store: Store, rank: int, size: int, facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All machines' facts on rank 0, empty elsewhere; each with `clock_seconds`, its clock's lead over rank 0's."""
    store.set(f"facts/{rank}", json.dumps(facts))
    if rank:
        for ping in range(PINGS):
            store.get(f"ping/{rank}/{ping}")
            store.set(f"pong/{rank}/{ping}", repr(time.time()))
        store.get("done")
        return []
    found = []
    for peer in range(size):
        clock, error = (0.0, 0.0) if peer == 0 else measure_clock(store, peer)
        facts_of_peer = json.loads(store.get(f"facts/{peer}"))
        found.append({**facts_of_peer, "clock_seconds": round(clock, 4), "clock_error": round(error, 4)})
    store.set("done", "1")
    return found


def measure_clock(store: Store, peer: int) -> tuple[float, float]:
    """(seconds by which a peer's clock is ahead, maximum error): from the fastest of several round trips."""
    best = (0.0, float("inf"))
    for ping in range(PINGS):
        start, began = time.time(), time.monotonic()
        store.set(f"ping/{peer}/{ping}", "1")
        answer = float(store.get(f"pong/{peer}/{ping}"))
        error = (time.monotonic() - began) / 2
        if error < best[1]:
            best = (answer - (start + error), error)
    return best


def compare(peers: list[dict[str, Any]]) -> list[Problem]:
    """Values that differ between machines but must not."""
    found = []
    for name in sorted({name for peer in peers for name in peer} - {"host", "clock_seconds", "clock_error"}):
        values: dict[str, list[str]] = {}
        for peer in peers:
            values.setdefault(str(peer.get(name)), []).append(peer["host"])
        if len(values) > 1:
            listed = "; ".join(f"{value} on {', '.join(hosts)}" for value, hosts in values.items())
            found.append(
                Problem(what=f"{name} differs between machines: {listed}", cure="install the same version on all of them")
            )
    for peer in peers:
        if abs(peer["clock_seconds"]) - peer["clock_error"] > CLOCK_SECONDS:
            found.append(
                Problem(
                    what=f"the clock of {peer['host']} is {peer['clock_seconds']:+.1f} s off {peers[0]['host']}'s",
                    cure="synchronize them: systemctl enable --now chrony",
                    severity="warning",
                )
            )
    return found

"""The policy's weights for engines: its own, or with an adapter the base model's plus the adapter's update."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from mpo_megatron import device
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.model.live_weights import LiveWeights, WeightInfo
from mpo_megatron.model.merging import merger


class Weights(Protocol):
    """Weights under their Hugging Face names, like `LiveWeights`; all ranks make the same calls."""

    @property
    def metadata(self) -> list[WeightInfo]:
        """Every weight, in the order of `stream`; the first call communicates."""

    def stream(self, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield the current weights on a rank that wants them; all ranks must exhaust the iterator."""


class MergedWeights:
    """The base model's weights with the adapter added (`Weights`)."""

    def __init__(self, base: LiveWeights, matrices: LiveWeights, adapter: Adapter, *, keep_base: bool) -> None:
        """Store the parts; nothing is communicated yet.

        Args:
            keep_base: keep the frozen weights on the host, so that later updates gather only the adapter
        """
        self.base, self.matrices, self.adapter, self.keep_base = base, matrices, adapter, keep_base
        self.kept: dict[str, Tensor] | None = None

    @property
    def metadata(self) -> list[WeightInfo]:
        """The base model's metadata."""
        return self.base.metadata

    def stream(self, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight with the adapter's current update added."""
        where = "cpu" if self.keep_base else device.device()
        matrices = {name: matrix.to(where) for name, matrix in self.matrices.stream(wanted=wanted)}
        merge = merger(self.adapter, matrices, None)
        for name, weight in self._base(wanted):
            yield name, merge(name, 0, weight)

    def _base(self, wanted: bool) -> Iterator[tuple[str, Tensor]]:
        if not self.keep_base:
            yield from self.base.stream(wanted=wanted)
            return
        if self.kept is None:
            self.kept = {name: weight.to("cpu") for name, weight in self.base.stream(wanted=wanted)}
        yield from self.kept.items()

"""What engines are given of the policy: its weights, or with an adapter the sums of the base model's and the adapter's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import Tensor

from mpo_megatron import device
from mpo_megatron.families.adapters import Adapter
from mpo_megatron.model.live_weights import LiveWeights, WeightInfo
from mpo_megatron.model.merging import merger


class Weights(Protocol):
    """Weights under their Hugging Face names, as `LiveWeights` has them; all ranks use them alike."""

    @property
    def metadata(self) -> list[WeightInfo]:
        """Every weight, in the order of `stream`; its first use communicates."""

    def stream(self, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield the current weights to a rank that asks for them; all ranks must exhaust it."""


class MergedWeights:
    """The base model's weights with the adapter added (`Weights`)."""

    def __init__(self, base: LiveWeights, matrices: LiveWeights, adapter: Adapter, *, keep_base: bool) -> None:
        """Nothing is communicated yet.

        Args:
            keep_base: keep the frozen weights on the host, so that only the adapter is sent again
        """
        self.base, self.matrices, self.adapter, self.keep_base = base, matrices, adapter, keep_base
        self.kept: dict[str, Tensor] | None = None

    @property
    def metadata(self) -> list[WeightInfo]:
        """As the base model's."""
        return self.base.metadata

    def stream(self, *, wanted: bool = True) -> Iterator[tuple[str, Tensor]]:
        """Yield each weight with what the adapter adds to it now."""
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

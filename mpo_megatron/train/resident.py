"""The reference model in memory beside the policy, for losses that compare whole distributions.

For the rows of a pass, the reference runs first, with the same schedule and layout as the policy, so that pipelines work. It
keeps the last hidden states of the scored tokens, [S, H] per row on the last stage, from which the policy's log-prob head
computes the reference's logits chunk by chunk. With `offload`, its weights stay in pinned host memory and move to the device only
while it runs; those of the output layer stay on the device, because the head needs them during the policy's pass.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpo_megatron import device
from mpo_megatron.data.packing import Row
from mpo_megatron.mcore.weights import unwrap
from mpo_megatron.model.adapters import adapters_off
from mpo_megatron.model.logprobs import Head
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.routing import RowRouting
from mpo_megatron.train.routing import record_rows, recorded_choices
from mpo_megatron.train.schedule import run_schedule, to_device


class Resident:
    """The reference model, without gradients, partitioned like the policy."""

    def __init__(self, parts: Sequence[torch.nn.Module], *, offload: bool = False, replay: bool = False) -> None:
        """Args:
        replay: route the policy's tokens to the experts that the reference chose
        """
        self.replay = replay
        self.choices: list[dict[int, Tensor]] = []
        """For each row of the last pass, the experts [T, k] of this rank's tokens by the layer's place; empty for dense
        models."""
        self.parts = [part.eval().requires_grad_(False) for part in parts]
        self.host: list[tuple[Tensor, Tensor]] = []
        if offload:
            last = unwrap(self.parts[-1])
            kept = {id(tensor) for tensor in last.head_weights()} if last.post_process else set()
            tensors = [
                tensor for part in self.parts for tensor in (*part.parameters(), *part.buffers()) if id(tensor) not in kept
            ]
            self.host = [(tensor, tensor.detach().to("cpu", copy=True).pin_memory()) for tensor in tensors]
            self._release()

    @torch.no_grad()
    def run(self, rows: Sequence[Row], ranks: Ranks) -> list[Head]:
        """The head of each row, over its scored tokens (with context parallelism, this rank's), on the last pipeline stage; empty
        on the others. All ranks call it."""
        routings = record_rows(rows, ranks) if unwrap(self.parts[0]).config.num_moe_experts else None
        with self.on_device():
            hidden = run_schedule(self.parts, rows, functools.partial(_forward, routings), forward_only=True)
            heads = [unwrap(self.parts[-1]).head(states) for states in hidden] if ranks.is_last_stage else []
        self.choices = [recorded_choices(routing) for routing in routings or ()]
        return heads

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within this context, offloaded weights are on the device."""
        for tensor, host in self.host:
            tensor.data = host.to(device.device(), non_blocking=True)
        try:
            yield
        finally:
            self._release()

    def _release(self) -> None:
        for tensor, _ in self.host:
            tensor.data = tensor.data.new_empty(0)
        if self.host:
            for part in self.parts:
                for module in part.modules():
                    getattr(module, "_fp8_workspaces", {}).clear()  # Transformer Engine's FP8 copies of weights


class AdapterOff(Resident):
    """The policy itself with its adapter off: the base model without a copy of its weights."""

    def __init__(self, model: Sequence[torch.nn.Module], *, replay: bool = False) -> None:
        self.replay, self.choices = replay, []
        self.parts, self.host = list(model), []

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        """Within this context, the adapter is off."""
        with adapters_off(self.parts):
            yield


def _forward(
    routings: Sequence[RowRouting] | None, iterator: Any, part: Any
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    index, source = next(iterator)
    row, model = to_device(source, None if routings is None else routings[index]), unwrap(part)
    arguments = (row.tokens, row.position_ids, row.layout)
    output = model.scored_hidden(*arguments, row.sources) if model.post_process else model.hidden_states(*arguments)

    def collect(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return states.new_zeros(()), torch.ones((), dtype=torch.int), states

    return output, collect

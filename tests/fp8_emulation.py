"""FP8 with delayed scaling on a CPU, for tests of what surrounds Transformer Engine.

Linear layers round weights and inputs to 8 bits under scales that follow from the largest values of earlier passes, and autocast
contexts nest and update as Transformer Engine's do: at the end of the outermost one, if gradients are on, and over all ranks.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer import transformer_block
from torch import Tensor

from mpo_megatron.model import precision

HISTORY = 4
LARGEST = 448.0
"""of float8_e4m3fn"""


class Round(torch.autograd.Function):
    """To 8 bits under a scale and back; gradients pass through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor) -> Tensor:
        scaled = (tensor.float() * scale).clamp(-LARGEST, LARGEST)
        return (scaled.to(torch.float8_e4m3fn).float() / scale).to(tensor.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class Delayed:
    """Scales of one layer's input and weight, with the methods of Transformer Engine's modules that are used."""

    scale: Tensor
    amax_history: Tensor

    def get_fp8_meta_tensors(self) -> dict[str, list[Tensor]]:
        return {"scaling_fwd": [self.scale.clone(), self.amax_history.clone()]}

    def reset_fp8_meta_tensors(self, saved: dict[str, list[Tensor]] | None = None) -> None:
        values = (torch.ones(2), torch.zeros(HISTORY, 2)) if saved is None else saved["scaling_fwd"]
        self.scale.copy_(values[0])
        self.amax_history.copy_(values[1])

    def get_extra_state(self) -> Tensor:
        return torch.cat((self.scale, self.amax_history.flatten()))

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None:
            self.reset_fp8_meta_tensors({"scaling_fwd": [state[:2], state[2:].view(HISTORY, 2)]})

    def rounded(self, tensor: Tensor, index: int) -> Tensor:
        self.amax_history[0, index] = torch.maximum(self.amax_history[0, index], tensor.detach().abs().max().float())
        return Round.apply(tensor, self.scale[index].clone())

    def update(self) -> None:
        if dist.get_world_size() > 1:
            dist.all_reduce(self.amax_history[0], dist.ReduceOp.MAX)
        largest = self.amax_history.amax(dim=0)
        self.scale.copy_(torch.where(largest > 0, LARGEST / largest, self.scale))
        self.amax_history.copy_(self.amax_history.roll(-1, 0))
        self.amax_history[0] = 0


class EmulatedColumn(Delayed, ColumnParallelLinear):
    def forward(self, input_: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
        assert weight is None
        return super().forward(self.rounded(input_, 0), self.rounded(self.weight, 1), **options)


class EmulatedRow(Delayed, RowParallelLinear):
    def forward(self, input_: Tensor) -> Any:
        return super().forward(self.rounded(input_, 0))


class Emulation:
    """Stands for Transformer Engine's global state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.depth = self.num_updates = 0
        self.modules: list[Delayed] = []
        for owner in (precision, transformer_block):
            monkeypatch.setattr(owner, "get_fp8_context", self.autocast)

    @contextlib.contextmanager
    def autocast(self, config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
        if is_init:
            yield
            return
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
            if self.depth == 0 and torch.is_grad_enabled():
                self.num_updates += 1
                for module in self.modules:
                    module.update()

    def convert(self, parts: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """The same parts, whose layers' matrices are emulated from here on."""
        for part in parts:
            for name, module in part.named_modules():
                if "layers." in name and isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    module.__class__ = EmulatedColumn if isinstance(module, ColumnParallelLinear) else EmulatedRow
                    module.scale, module.amax_history = torch.ones(2), torch.zeros(HISTORY, 2)
                    self.modules.append(module)
        return parts

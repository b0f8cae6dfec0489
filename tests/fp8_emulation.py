"""FP8 with delayed scaling on a CPU, for tests of what surrounds Transformer Engine.

Linear layers round weights, inputs and their outputs' gradients to 8 bits under scales that follow from the largest values of
earlier passes, and autocast contexts nest and update as those of Transformer Engine 2.11 do: at the end of the outermost one, if
gradients are on, and over all ranks; the gradients' scales in the backward pass of whatever module was the first in its context,
which every inner context that ends makes possible anew.
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
FORMATS = (torch.float8_e4m3fn, torch.float8_e4m3fn, torch.float8_e5m2)
"""of inputs, weights, gradients"""
LARGEST = torch.tensor([torch.finfo(dtype).max for dtype in FORMATS])


def to_8_bits(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Under a scale to 8 bits and back."""
    largest = torch.finfo(dtype).max
    return ((tensor.float() * scale).clamp(-largest, largest).to(dtype).float() / scale).to(tensor.dtype)


class Round(torch.autograd.Function):
    """To 8 bits; gradients pass through."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
        return to_8_bits(tensor, scale, dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0], None, None


class RoundGradient(torch.autograd.Function):
    """The gradient to 8 bits, under the scale that there is then; the first module of a context updates gradients' scales."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, module: Delayed) -> Tensor:
        ctx.module, ctx.first = module, module.emulation.IS_FIRST_FP8_MODULE
        module.emulation.IS_FIRST_FP8_MODULE = False
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        ctx.module.record(gradients[0], 2)
        rounded = to_8_bits(gradients[0], ctx.module.scale[2], FORMATS[2])
        if ctx.first:
            ctx.module.emulation.reduce_and_update_fp8_tensors(forward=False)
        return rounded, None


class Delayed:
    """Scales of one layer's input, weight and gradient, with the methods of Transformer Engine's modules that are used."""

    scale: Tensor
    amax_history: Tensor
    emulation: Emulation

    def get_fp8_meta_tensors(self) -> dict[str, list[Tensor]]:
        return {"scaling_fwd": [self.scale.clone(), self.amax_history.clone()]}

    def reset_fp8_meta_tensors(self, saved: dict[str, list[Tensor]] | None = None) -> None:
        values = (torch.ones(3), torch.zeros(HISTORY, 3)) if saved is None else saved["scaling_fwd"]
        self.scale.copy_(values[0])
        self.amax_history.copy_(values[1])

    def get_extra_state(self) -> Tensor:
        return torch.cat((self.scale, self.amax_history.flatten()))

    def set_extra_state(self, state: Tensor | None) -> None:
        if state is not None:
            self.reset_fp8_meta_tensors({"scaling_fwd": [state[:3], state[3:].view(HISTORY, 3)]})

    def record(self, tensor: Tensor, index: int) -> None:
        self.amax_history[0, index] = torch.maximum(self.amax_history[0, index], tensor.detach().abs().max().float())

    def rounded(self, tensor: Tensor, index: int) -> Tensor:
        self.record(tensor, index)
        return Round.apply(tensor, self.scale[index].clone(), FORMATS[index])

    def update(self, which: slice) -> None:
        history, scale = self.amax_history[:, which], self.scale[which]
        if dist.get_world_size() > 1:
            newest = history[0].clone()
            dist.all_reduce(newest, dist.ReduceOp.MAX)
            history[0] = newest
        largest = history.amax(dim=0)
        scale.copy_(torch.where(largest > 0, LARGEST[which] / largest, scale))
        history.copy_(history.roll(-1, 0))
        history[0] = 0


class EmulatedColumn(Delayed, ColumnParallelLinear):
    def forward(self, input_: Tensor, weight: Tensor | None = None, **options: Any) -> Any:
        assert weight is None
        output, bias = super().forward(self.rounded(input_, 0), self.rounded(self.weight, 1), **options)
        return RoundGradient.apply(output, self), bias


class EmulatedRow(Delayed, RowParallelLinear):
    def forward(self, input_: Tensor) -> Any:
        output, bias = super().forward(self.rounded(input_, 0))
        return RoundGradient.apply(output, self), bias


class Emulation:
    """Stands for Transformer Engine's global state."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.depth = self.num_updates = self.num_gradient_updates = 0
        self.IS_FIRST_FP8_MODULE = False
        self.modules: list[Delayed] = []
        for owner in (precision, transformer_block):
            monkeypatch.setattr(owner, "get_fp8_context", self.autocast)
        monkeypatch.setattr(precision, "transformer_engine_state", lambda: self)

    @contextlib.contextmanager
    def autocast(self, config: Any, layer_no: int = -1, is_init: bool = False) -> Iterator[None]:
        if is_init:
            yield
            return
        before = self.IS_FIRST_FP8_MODULE
        if self.depth == 0:
            self.IS_FIRST_FP8_MODULE = True
        self.depth += 1
        try:
            yield
        finally:
            self.IS_FIRST_FP8_MODULE = before
            self.depth -= 1
            if self.depth == 0 and torch.is_grad_enabled():
                self.reduce_and_update_fp8_tensors(forward=True)

    def reduce_and_update_fp8_tensors(self, *, forward: bool) -> None:
        self.num_updates += forward
        self.num_gradient_updates += not forward
        for module in self.modules:
            module.update(slice(0, 2) if forward else slice(2, 3))

    def convert(self, parts: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """The same parts, whose layers' matrices are emulated from here on."""
        for part in parts:
            for name, module in part.named_modules():
                if "layers." in name and isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    module.__class__ = EmulatedColumn if isinstance(module, ColumnParallelLinear) else EmulatedRow
                    module.scale, module.amax_history, module.emulation = torch.ones(3), torch.zeros(HISTORY, 3), self
                    self.modules.append(module)
        return parts

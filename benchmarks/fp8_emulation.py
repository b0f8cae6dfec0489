"""FP8's rounding on a CPU: what Transformer Engine's recipes do to the numbers, without their kernels or their speed.

The layers' matrix products take inputs, weights and output gradients that went to 8 bits and back (e4m3; gradients e5m2 but with
`blockwise`), and are computed in float32, as the tensor cores accumulate; all else is the trainer's own code. Scales:

    current    one a tensor, from its largest value, rounded down to a power of 2 (docs/fp8.md)
    delayed    one a tensor, from its largest values in earlier steps; before the first step is done, from the tensor itself
    blockwise  one for 128 values along the summed dimension, of weights for 128 × 128, powers of 2
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from torch import Tensor

RECIPES = ("current", "delayed", "blockwise")
BLOCK = 128


class Scales:
    """The largest value that each of a layer's tensors had, in a step and before: the state of `delayed`."""

    def __init__(self) -> None:
        self.measured = torch.zeros(3)
        self.used = torch.zeros(3)

    def measure(self, kind: int, tensor: Tensor) -> None:
        """A tensor of this step: 0 an input, 1 a weight, 2 a gradient."""
        self.measured[kind] = torch.maximum(self.measured[kind], tensor.abs().max().float())

    def update(self) -> None:
        """A step is done. A history is not kept: the largest value so far stands for that of the last 1024 steps."""
        self.used = torch.maximum(self.used, self.measured)


def scale_of(largest: Tensor, dtype: torch.dtype, *, power_of_two: bool) -> Tensor:
    """Takes the largest value to the largest number of the format; 1 where all is 0."""
    scale = torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0)
    return torch.exp2(torch.floor(torch.log2(scale))) if power_of_two else scale


def round_to(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """To 8 bits under a scale and back, float32."""
    largest = torch.finfo(dtype).max
    return (tensor * scale).clamp(-largest, largest).to(dtype).float() / scale


def round_blocks(tensor: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """A matrix in blocks of rows × columns, each with a scale of its own."""
    height, width = tensor.shape
    padded = F.pad(tensor, (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [height / rows, rows, width / columns, columns]
    rounded = round_to(blocks, scale_of(blocks.abs().amax((1, 3), keepdim=True), dtype, power_of_two=True), dtype)
    return rounded.flatten(2).flatten(0, 1)[:height, :width]


class Product(torch.autograd.Function):
    """input [T, H] · weightᵀ [H, O] of rounded matrices; so are both products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, recipe: str, scales: Scales) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.recipe, ctx.scales = recipe, scales
        left = rounded(inputs, 0, recipe, scales, summed=1)
        return (left @ rounded(weight, 1, recipe, scales, summed=1).T).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (gradient,), (inputs, weight) = grad_outputs, ctx.saved_tensors
        recipe, scales = ctx.recipe, ctx.scales
        scales.measure(2, gradient)
        by_input = rounded(gradient, 2, recipe, scales, summed=1) @ rounded(weight, 1, recipe, scales, summed=0)
        by_weight = rounded(gradient, 2, recipe, scales, summed=0).T @ rounded(inputs, 0, recipe, scales, summed=0)
        return by_input.to(inputs.dtype), by_weight.to(weight.dtype), None, None


def rounded(tensor: Tensor, kind: int, recipe: str, scales: Scales, *, summed: int) -> Tensor:
    """A matrix as the kernel reads it.

    Args:
        kind: 0 an input, 1 a weight, 2 a gradient
        summed: the dimension that the product sums over
    """
    tensor = tensor.float()
    if recipe == "blockwise":
        if kind == 1:
            return round_blocks(tensor, torch.float8_e4m3fn, BLOCK, BLOCK)
        return round_blocks(tensor, torch.float8_e4m3fn, *((1, BLOCK) if summed == 1 else (BLOCK, 1)))
    dtype = torch.float8_e5m2 if kind == 2 else torch.float8_e4m3fn
    largest = tensor.abs().max()
    if recipe == "delayed":
        largest = scales.used[kind] if scales.used[kind] > 0 else largest
    return round_to(tensor, scale_of(largest, dtype, power_of_two=recipe == "current"), dtype)


@contextlib.contextmanager
def emulate(recipe: str, parts: list[Any]) -> Iterator[list[Scales]]:
    """Within it the products of all layers of the parts, on one rank, are those of an FP8 recipe; their scales, to update."""
    everything = []
    with contextlib.ExitStack() as stack:
        for part in parts:
            for name, module in part.named_modules():
                if "layers." in name and isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    scales = Scales()
                    everything.append(scales)
                    stack.enter_context(mock.patch.object(module, "forward", product_of(module, recipe, scales)))
        yield everything


def product_of(module: Any, recipe: str, scales: Scales) -> Any:
    """What stands for the module's forward pass."""

    def forward(inputs: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        if torch.is_grad_enabled():  # forward-only passes leave no trace
            scales.measure(0, inputs.detach())
            scales.measure(1, module.weight.detach())
        output = Product.apply(inputs.flatten(0, -2), module.weight, recipe, scales)
        output = output.unflatten(0, inputs.shape[:-1])
        if module.bias is None or module.skip_bias_add:
            return output, module.bias
        return output + module.bias, None

    return forward

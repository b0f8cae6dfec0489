"""FP8's rounding on a CPU: the numerical effect of Transformer Engine's recipes, without their kernels or speed.

The layers' matrix products take inputs, weights and output gradients rounded to 8 bits and back (e4m3; gradients e5m2 except with
`blockwise`), and are computed in float32, like tensor cores accumulate; all else is the trainer's own code. Scales:

    current    one per tensor, from its largest value, rounded down to a power of 2 (docs/reference/fp8.md)
    blockwise  one per 128 values along the summed dimension, for weights per 128 × 128, powers of 2
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

RECIPES = ("current", "blockwise")
BLOCK = 128


def scale_of(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """The largest power of 2 with which `largest` still fits the format; 1 where all is 0."""
    return torch.exp2(torch.floor(torch.log2(torch.where(largest > 0, torch.finfo(dtype).max / largest, 1.0))))


def round_to(tensor: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to 8 bits with a scale and back, float32."""
    largest = torch.finfo(dtype).max
    return (tensor * scale).clamp(-largest, largest).to(dtype).float() / scale


def round_blocks(tensor: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Round a matrix in blocks of rows × columns, each with its own scale."""
    height, width = tensor.shape
    padded = F.pad(tensor, (0, -width % columns, 0, -height % rows))
    blocks = padded.unflatten(1, (-1, columns)).unflatten(0, (-1, rows))  # [height / rows, rows, width / columns, columns]
    rounded = round_to(blocks, scale_of(blocks.abs().amax((1, 3), keepdim=True), dtype), dtype)
    return rounded.flatten(2).flatten(0, 1)[:height, :width]


class Product(torch.autograd.Function):
    """input [T, H] · weightᵀ [H, O] of rounded matrices, also in both products of the backward pass."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, recipe: str) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.recipe = recipe
        return (rounded(inputs, 0, recipe, summed=1) @ rounded(weight, 1, recipe, summed=1).T).to(inputs.dtype)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,), (inputs, weight), recipe = grad_outputs, ctx.saved_tensors, ctx.recipe
        by_input = rounded(gradient, 2, recipe, summed=1) @ rounded(weight, 1, recipe, summed=0)
        by_weight = rounded(gradient, 2, recipe, summed=0).T @ rounded(inputs, 0, recipe, summed=0)
        return by_input.to(inputs.dtype), by_weight.to(weight.dtype), None


def rounded(tensor: Tensor, kind: int, recipe: str, *, summed: int) -> Tensor:
    """A matrix as the kernel would read it.

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
    return round_to(tensor, scale_of(tensor.abs().max(), dtype), dtype)


@contextlib.contextmanager
def emulate(recipe: str, parts: list[Any]) -> Iterator[None]:
    """Compute the products of all layers of the parts, on one rank, with an FP8 recipe's rounding."""
    with contextlib.ExitStack() as stack:
        for part in parts:
            for name, module in part.named_modules():
                if "layers." in name and isinstance(module, (ColumnParallelLinear, RowParallelLinear)):
                    stack.enter_context(mock.patch.object(module, "forward", product_of(module, recipe)))
        yield


def product_of(module: Any, recipe: str) -> Any:
    """A forward pass of the module with rounding."""

    def forward(inputs: Tensor, **_: Any) -> tuple[Tensor, Tensor | None]:
        output = Product.apply(inputs.flatten(0, -2), module.weight, recipe).unflatten(0, inputs.shape[:-1])
        if module.bias is None or module.skip_bias_add:
            return output, module.bias
        return output + module.bias, None

    return forward

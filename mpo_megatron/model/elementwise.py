"""Elementwise parts of a layer as single autograd operations: rotary embedding, gated activation, RMS norm.

For Megatron-Core's local layers; Transformer Engine has its own kernels. Written as PyTorch expressions, each part copies large
tensors several times: a CPU spends more time on these copies than on arithmetic.

Legend: T tokens, A heads, D channels of a head, F channels of the MLP, H hidden channels.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 256
"""Tokens processed at a time, so that temporaries stay in a CPU's cache."""


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotary embedding of queries or keys: channel d is rotated with channel d + n; channels from 2n on are unchanged.

    Args:
        x: [T, …, D], any strides
        cosines, sines: [T, …, n] of each token's angles, without gradients
    Returns:
        [T, …, D], contiguous
    """
    rotated: Tensor = _Rotate.apply(x, cosines.to(x.dtype), sines.to(x.dtype))
    return rotated


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
        ctx.save_for_backward(cosines, sines)
        return _rotated(x, cosines, sines, 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cosines, sines = ctx.saved_tensors
        return _rotated(grad, cosines, sines, -1), None, None


def _rotated(x: Tensor, cosines: Tensor, sines: Tensor, direction: int) -> Tensor:
    half = cosines.shape[-1]
    output = torch.empty_like(x, memory_format=torch.contiguous_format)
    (first, second, rest), (to_first, to_second, to_rest) = (
        part.split([half, half, x.shape[-1] - 2 * half], dim=-1) for part in (x, output)
    )
    torch.mul(first, cosines, out=to_first).addcmul_(second, sines, value=-direction)
    torch.mul(second, cosines, out=to_second).addcmul_(first, sines, value=direction)
    to_rest.copy_(rest)
    return output


def gelu_tanh(x: Tensor) -> Tensor:
    """GELU in its tanh approximation."""
    return torch.nn.functional.gelu(x, approximate="tanh")


def _silu_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def _gelu_tanh_backward(grad: Tensor, x: Tensor) -> Tensor:
    return torch.ops.aten.gelu_backward.grad_input(grad, x, approximate="tanh", grad_input=grad)


Activation = Callable[[Tensor], Tensor]

DERIVATIVES: dict[Activation, Callable[[Tensor, Tensor], Tensor]] = {
    torch.nn.functional.silu: _silu_backward,
    gelu_tanh: _gelu_tanh_backward,
}
"""Activation → function that computes its derivative times a gradient, overwriting the gradient."""


def gate(x: Tensor, activation: Activation) -> Tensor:
    """activation(first half of the channels) · second half: [T, …, 2F] to [T, …, F].

    Args:
        activation: a key of DERIVATIVES
    """
    gated: Tensor = _Gate.apply(x, activation)
    return gated


class _Gate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Activation) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        activated = activation(first)
        ctx.save_for_backward(x, activated)
        ctx.activation = activation
        return activated * second

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        x, activated = ctx.saved_tensors
        first, second = x.chunk(2, dim=-1)
        grad_x = torch.empty_like(x)
        grad_first, grad_second = grad_x.chunk(2, dim=-1)
        torch.mul(grad, activated, out=grad_second)
        DERIVATIVES[ctx.activation](torch.mul(grad, second, out=grad_first), first)
        return grad_x, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / √(mean of x² over its channels + eps) · weight: [T, …, H] to the same shape.

    On a GPU, and for dtypes narrower than float32, PyTorch's own function is used.
    """
    if x.is_cuda or x.dtype not in (torch.float32, torch.float64):
        return torch.nn.functional.rms_norm(x, weight.shape, weight, eps)
    normalized: Tensor = _RMSNorm.apply(x, weight, eps)
    return normalized


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        """With r the inverse RMS and w the weight: ∂x = r (g·w − x · r² mean(g·w·x)), ∂w = Σ g·x·r over tokens."""
        x, weight, inverse = ctx.saved_tensors
        channels = x.shape[-1]
        grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
        grad_weight = torch.zeros_like(weight)
        tensors = (part.reshape(-1, part.shape[-1]).split(BLOCK) for part in (x, grad, inverse))
        for part, own, scale, output in zip(*tensors, grad_x.view(-1, channels).split(BLOCK), strict=True):
            products = torch.mul(own, part, out=output)
            grad_weight.addmv_(products.T, scale[:, 0])
            mean = torch.mv(products, weight)[:, None].mul_(scale).mul_(scale).div_(-channels)
            torch.mul(own, weight, out=output).addcmul_(part, mean).mul_(scale)
        return grad_x, grad_weight, None

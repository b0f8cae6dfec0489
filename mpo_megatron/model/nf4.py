"""NF4: a matrix with 4 bits per weight (Dettmers et al. 2023, arXiv:2305.14314), with bitsandbytes' kernels for CPUs and GPUs.

Each block of 64 neighbours in a row is divided by its largest absolute value, and each quotient rounded to the nearest of 16
quantiles of the normal distribution. Scales stay float32: quantizing them too would save 0.37 bits per weight, but would couple
blocks of the whole tensor, so that another layout would have other weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.hf.quantization import BLOCK


@dataclass(frozen=True)
class Blocks:
    """A matrix [rows, columns] in blocks."""

    codes: Tensor
    """[rows · columns / 2, 1] uint8: two weights per byte."""
    state: Any
    """bitsandbytes' `QuantState`: shape, dtype, the 16 values, and the scales [rows · columns / 64] in float32."""

    def dequantize(self) -> Tensor:
        """The represented matrix, in the dtype before quantization."""
        from bitsandbytes.functional import dequantize_4bit

        matrix: Tensor = dequantize_4bit(self.codes, self.state)
        return matrix

    @property
    def num_bytes(self) -> int:
        """Memory size in bytes."""
        return self.codes.nbytes + int(self.state.absmax.nbytes)


@torch.no_grad()
def quantize(matrix: Tensor) -> Blocks:
    """Quantize a matrix [rows, columns] in blocks along its rows; `columns` is a multiple of 64."""
    from bitsandbytes.functional import quantize_4bit

    assert matrix.shape[-1] % BLOCK == 0, matrix.shape
    codes, state = quantize_4bit(matrix.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return Blocks(codes, state)


def rounded(matrix: Tensor) -> Tensor:
    """A matrix [rows, columns] after quantizing and dequantizing; each row depends only on itself."""
    return quantize(matrix).dequantize()

"""NF4: a matrix in 4 bits a weight (Dettmers et al. 2023, arXiv:2305.14314), by bitsandbytes' kernels for CPUs and GPUs.

Each block of 64 neighbours in a row is divided by its largest absolute value, and each quotient rounded to the nearest of 16
quantiles of the normal distribution. Scales stay float32: to quantize them, too, would save 0.37 bits a weight, and join blocks
of a whole tensor, so that another layout would have other weights.
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
    """[rows · columns / 2, 1] uint8: two weights each."""
    state: Any
    """bitsandbytes' `QuantState`: shape, dtype, the 16 values, and the scales [rows · columns / 64] in float32."""

    def dequantize(self) -> Tensor:
        """The matrix that it represents, in the dtype that it was quantized from."""
        from bitsandbytes.functional import dequantize_4bit

        matrix: Tensor = dequantize_4bit(self.codes, self.state)
        return matrix

    @property
    def num_bytes(self) -> int:
        """Memory that it takes."""
        return self.codes.nbytes + int(self.state.absmax.nbytes)


@torch.no_grad()
def quantize(matrix: Tensor) -> Blocks:
    """A matrix [rows, columns] in blocks along its rows; `columns` is a multiple of 64."""
    from bitsandbytes.functional import quantize_4bit

    assert matrix.shape[-1] % BLOCK == 0, matrix.shape
    codes, state = quantize_4bit(matrix.contiguous(), blocksize=BLOCK, compress_statistics=False, quant_type="nf4")
    return Blocks(codes, state)


def rounded(matrix: Tensor) -> Tensor:
    """The values of a matrix [rows, columns] after a round trip through blocks; any number of whole rows gives the same."""
    return quantize(matrix).dequantize()

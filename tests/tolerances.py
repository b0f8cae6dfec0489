"""Tolerances between two computations of the same floating-point sum."""

import math

import torch

ROOM = 16
"""Factor for cancellation, for layers between a sum and the compared values, and for other processors' kernels."""


def reordered(length: int, dtype: torch.dtype = torch.float32) -> float:
    """Difference to allow between two sums of `length` terms added in different orders, relative to their largest value.

    Rounding errors of a sum walk randomly: eps · √length. A term too many or too few shows as 1/length, far above.
    """
    return ROOM * torch.finfo(dtype).eps * math.sqrt(length)

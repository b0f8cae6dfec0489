"""Run a model of `transformers` in float64 throughout: the truth that float32 computations are compared with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Float64(TorchFunctionMode):
    """Within this context, conversions to float32 convert to float64.

    Models convert to float32 what bf16 rounds too coarsely: norms, rotary angles, decays, softmax. In a float64 model these
    would be the only steps in float32.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.Tensor.float:
            func = torch.Tensor.double
        args = [_wide(item) for item in args]
        return func(*args, **{name: _wide(item) for name, item in (kwargs or {}).items()})


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument

"""Choose a run's attention back end from the configuration and this machine's kernels."""

from __future__ import annotations

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, require
from mpo_megatron.model.attention import RowAttention, sdpa_row_attention
from mpo_megatron.model.attention_cpu import cpu_row_attention


def choose_attention(model: ModelConfig, *, capped: bool = False) -> str:
    """The back end for this machine: `sdpa`, `flex` or `varlen`.

    `auto` is `sdpa` without a GPU and in float32, where exactness matters most. With bf16 on a GPU it is `varlen` if a kernel is
    installed, else `flex`.

    Args:
        capped: the model caps its scores, which not every kernel supports
    Raises:
        ConfigError: a requested back end does not work here; gives the reason.
    """
    if model.attention != "auto":
        missing = _missing(model) or (_missing_cap(model) if capped else None)
        require(
            missing is None,
            f"model.attention = {model.attention}, but {missing}; set model.attention to auto or sdpa.",
        )
        return model.attention
    if not device.has_gpu() or model.precision == "fp32":
        return "sdpa"
    from mpo_megatron.model.attention_varlen import find_kernel

    return "flex" if (find_kernel(capped=True) if capped else find_kernel()) is None else "varlen"


def _missing(model: ModelConfig) -> str | None:
    """Why the configured back end cannot be used here; None if it can."""
    if model.attention in ("flex", "varlen") and not device.has_gpu():
        return "this machine has no GPU, and its backward pass needs one"
    if model.attention == "varlen":
        from mpo_megatron.model.attention_varlen import NO_KERNEL, find_kernel

        if model.precision == "fp32":
            return "its kernels do not support float32 (model.precision)"
        if find_kernel() is None:
            return NO_KERNEL
    return None


def _missing_cap(model: ModelConfig) -> str | None:
    """Why the configured back end cannot cap scores; None if it can."""
    if model.attention != "varlen":
        return None
    from mpo_megatron.model.attention_varlen import find_kernel

    return None if find_kernel(capped=True) is not None else "the model caps attention scores, which only flash-attn's kernels do"


def attention_function(name: str) -> RowAttention:
    """The function of a back end; it is imported here, so that only the one in use needs its packages."""
    if name == "flex":
        from mpo_megatron.model.attention_flex import flex_row_attention

        return flex_row_attention
    if name == "varlen":
        from mpo_megatron.model.attention_varlen import varlen_row_attention

        return varlen_row_attention
    return sdpa_row_attention if device.has_gpu() else cpu_row_attention

"""Activations that are not kept on the GPU for backward: recomputed, or offloaded to host memory."""

from __future__ import annotations

from typing import Any

from mpo_megatron.config import ModelConfig, require
from mpo_megatron.model.precision import missing_for_transformer_engine


def recompute_settings(model: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's settings for recomputation."""
    if model.recompute == "full":
        return {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    if model.recompute == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": list(model.recompute_modules)}
    return {}


def offload_settings(model: ModelConfig) -> dict[str, Any]:
    """Megatron-Core's settings for activations offloaded to host memory.

    Not its "fine-grained" offloading, which assumes that every step has as many rows as the first; here their number varies.
    """
    if not model.offload_layers:
        return {}
    return {
        "cpu_offloading": True,
        "cpu_offloading_num_layers": model.offload_layers,
        "cpu_offloading_activations": True,
        "cpu_offloading_weights": False,
    }


def check_offload_kernel(model: ModelConfig) -> None:
    """Refuse offloading without Transformer Engine, which Megatron-Core uses for it.

    Raises:
        ConfigError: Transformer Engine or a GPU is missing.
    """
    missing = missing_for_transformer_engine() if model.offload_layers else None
    require(
        missing is None,
        f"model.offload_layers = {model.offload_layers}, but {missing}, and Megatron offloads activations with Transformer "
        "Engine; set it to 0.",
    )

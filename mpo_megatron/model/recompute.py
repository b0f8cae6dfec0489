"""What of a layer's activations is not kept for the backward pass: computed again, or moved to host memory."""

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
    """Megatron-Core's settings for activations that wait in host memory.

    Its "fine-grained" offloading is another: it takes the first step's rows for those of every step, whose number differs here.
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
    """Refuse to move activations without Transformer Engine, by which Megatron-Core does it.

    Raises:
        ConfigError: it is missing, or there is no GPU to move them from.
    """
    missing = missing_for_transformer_engine() if model.offload_layers else None
    require(
        missing is None,
        f"model.offload_layers = {model.offload_layers}, but {missing}, and Megatron moves activations with Transformer Engine; "
        "set it to 0.",
    )

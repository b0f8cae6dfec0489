"""FP8: settings of a recipe for Megatron-Core, and whether this machine supports it.

With FP8, the matrix products of the layers take 8-bit inputs (Transformer Engine quantizes weights, activations and gradients).
Everything else is as in bf16: residuals, norms, attention, the embedding, and the log-prob head, which multiplies bf16 matrices
and reduces in float32. Master weights and optimizer states are float32.

Every recipe here computes its scales from the tensor being quantized, so FP8 has no state: a token's log-prob depends on weights
and context alone, as in bf16 (with `current`, almost). Transformer Engine's `delayed` recipe is not offered: it takes scales from
earlier passes and updates them at the end of every outermost autocast, but a step here runs many rows
(docs/reference/fp8.md).
"""

from __future__ import annotations

import os
from typing import Any

import torch

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family
from mpo_megatron.hf.fp8 import RECIPES, validate_fp8_layout
from mpo_megatron.mcore.preparation import POWER_OF_TWO_SCALES
from mpo_megatron.stack.transformer_engine import broken_transformer_engine, install_transformer_engine, is_installed

UNROUNDED = "_high_precision_init_val"
"""Attribute where Transformer Engine keeps the values from which an FP8 parameter was made."""


def fp8_settings(model: ModelConfig) -> dict[str, Any]:
    """FP8 settings for Megatron-Core's TransformerConfig; empty without FP8."""
    if model.fp8 == "none":
        return {}
    recipe = RECIPES[model.fp8]
    return {
        "fp8": recipe.format,
        "fp8_recipe": recipe.megatron,
        "fp8_param": model.fp8_params,
        "first_last_layers_bf16": model.fp8_bf16_layers > 0,
        "num_layers_at_start_in_bf16": model.fp8_bf16_layers,
        "num_layers_at_end_in_bf16": model.fp8_bf16_layers,
    }


def numerics(model: ModelConfig) -> list[str | int | bool] | None:
    """The FP8 settings that affect log-probs; None without FP8."""
    return None if model.fp8 == "none" else [model.fp8, model.fp8_bf16_layers, model.fp8_params]


def validate_fp8(model: ModelConfig, parallel: ParallelConfig, family: Family) -> None:
    """Check that this machine, model and layout support `model.fp8`, without loading anything.

    Raises:
        ConfigError: names the field, the reason and the fix.
    """
    if model.fp8 == "none":
        return
    missing = missing_for_transformer_engine()
    require(
        missing is None,
        f"model.fp8 = {model.fp8}, but {missing}. Or set model.fp8 to none.",
    )
    missing = missing_for_recipe(model.fp8)
    require(missing is None, f"model.fp8 = {model.fp8}, but {missing}; set model.fp8 to another recipe, or to none.")
    validate_fp8_layout(model, parallel, family)


def missing_for_transformer_engine() -> str | None:
    """Why layers cannot come from Transformer Engine here, and the fix; None if they can."""
    if not device.has_gpu():
        return "this machine has no GPU; use one that has a GPU"
    if not is_installed():
        return f"Transformer Engine is not installed; {install_transformer_engine()}"
    problem = broken_transformer_engine()
    return None if problem is None else str(problem)


def missing_for_recipe(name: str) -> str | None:
    """Why this machine's GPU does not support a recipe; None if it does. Requires Transformer Engine."""
    import transformer_engine.pytorch as engine

    availability = getattr(engine, RECIPES[name].availability, None)
    if availability is None:
        return f"this version of Transformer Engine has no {RECIPES[name].availability}"
    available, reason = availability(return_reason=True)
    if not available:
        return str(reason).rstrip(".")
    return missing_powers_of_two() if name == "current" else None


def missing_powers_of_two() -> str | None:
    """Why `current` would not round its scales to powers of 2 despite mcore.preparation; None if it does."""
    from transformer_engine.common.recipe import Float8CurrentScaling

    asked = os.environ.get(POWER_OF_TWO_SCALES) == "1"
    if not asked or getattr(Float8CurrentScaling(), "use_power_2_scales", False):
        return None
    return (
        f"Transformer Engine ignores {POWER_OF_TWO_SCALES}=1, so a token's log-prob would depend on its row; import it "
        "after mpo_megatron.mcore.preparation.prepare(), or use another version"
    )


def keep_exact_weights(part: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Make the optimizer start from the loaded weights, not from their FP8 rounding (`model.fp8_params`).

    An FP8 parameter keeps its unrounded initial values until the optimizer takes them; these must be replaced.

    Raises:
        AttributeError: this version of Transformer Engine stores them elsewhere.
    """
    for name, parameter in part.named_parameters():
        if not hasattr(parameter, "get_high_precision_init_val"):
            continue
        if not hasattr(parameter, UNROUNDED):
            raise AttributeError(f"Transformer Engine's FP8 parameters have no {UNROUNDED}; model/precision.py must follow it")
        setattr(parameter, UNROUNDED, weights[name].detach().cpu())

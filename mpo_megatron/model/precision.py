"""FP8: which recipes there are, what they ask of machine, model and rows, and where their scales come from.

With FP8 the matrix products of the layers take 8-bit inputs (Transformer Engine quantizes weights, activations and gradients);
everything else stays as it is in bf16: residuals, norms, attention, the embedding, and the log-prob head, which multiplies bf16
matrices and reduces in float32. Master weights and optimizer states are float32.

Recipes differ in where a scale comes from. `current`, `blockwise` and `mxfp8` take it from the very tensor that is quantized:
what a token yields depends on weights and context alone, nearly so with `current`: all as in bf16. `delayed` takes it from the
largest values of earlier passes, a state that each pass would change. Here that state belongs to the optimizer step: it changes
once, when a step's passes are done (`scales`), forward-only passes leave it as they found it, and before the first step it is
measured on the first groups of the training data (train/calibration.py). docs/fp8.md has the reasons and the limits.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.utils import get_model_config
from transformers import PretrainedConfig

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.hf.fp8 import RECIPES, validate_fp8_layout

AMAX_HISTORY = 1024
"""Steps whose largest values `delayed` looks back on: Transformer Engine's own default."""


def fp8_settings(model: ModelConfig) -> dict[str, Any]:
    """What Megatron-Core's TransformerConfig is told of FP8: nothing without it."""
    if model.fp8 == "none":
        return {}
    recipe = RECIPES[model.fp8]
    return {
        "fp8": recipe.format,
        "fp8_recipe": recipe.megatron,
        "fp8_param": model.fp8_params,
        "fp8_amax_history_len": AMAX_HISTORY,
        "fp8_amax_compute_algo": "max",
        "first_last_layers_bf16": model.fp8_bf16_layers > 0,
        "num_layers_at_start_in_bf16": model.fp8_bf16_layers,
        "num_layers_at_end_in_bf16": model.fp8_bf16_layers,
    }


def numerics(model: ModelConfig) -> list[str | int | bool] | None:
    """What of the FP8 settings the log-probs depend on; None without FP8."""
    return None if model.fp8 == "none" else [model.fp8, model.fp8_bf16_layers, model.fp8_params]


def validate_fp8(model: ModelConfig, parallel: ParallelConfig, hf_config: PretrainedConfig) -> None:
    """Check that this machine and this model on this layout can compute as `model.fp8` says; nothing is loaded for it.

    Raises:
        ConfigError: naming the field, the reason and the fix.
    """
    if model.fp8 == "none":
        return
    missing = missing_for_transformer_engine()
    require(
        missing is None,
        f"model.fp8 = {model.fp8}, but {missing}; install it (pip install 'mpo-megatron[gpu]') on a machine with a GPU, or set "
        "model.fp8 to none.",
    )
    missing = missing_for_recipe(model.fp8)
    require(missing is None, f"model.fp8 = {model.fp8}, but {missing}; set model.fp8 to another recipe, or to none.")
    validate_fp8_layout(model, parallel, hf_config)


def missing_for_transformer_engine() -> str | None:
    """Why layers cannot come from Transformer Engine here; None if they can."""
    if not device.has_gpu():
        return "this machine has no GPU"
    try:
        import transformer_engine.pytorch  # noqa: F401
    except ImportError as error:
        return f"transformer_engine does not import ({error})"
    return None


def missing_for_recipe(name: str) -> str | None:
    """Why this machine's GPU cannot compute a recipe; None if it can. Transformer Engine is there."""
    import transformer_engine.pytorch as engine

    available, reason = getattr(engine, RECIPES[name].availability)(return_reason=True)
    return None if available else str(reason).rstrip(".")


def has_delayed_scales(part: torch.nn.Module) -> bool:
    """Whether a model's scales are a state that earlier passes left."""
    config = get_model_config(part)
    return bool(config.fp8) and config.fp8_recipe == RECIPES["delayed"].megatron


@contextlib.contextmanager
def scales(model: Sequence[torch.nn.Module], *, forward_only: bool) -> Iterator[None]:
    """Run all rows of a pass under the same delayed scales; does nothing for other recipes and without FP8.

    With backward, the scales are brought up to date when the context ends. Those of weights and activations Transformer Engine
    updates when its outermost autocast ends, and so this one is put around those of the layers. Those of gradients it would
    update in the backward pass of what it takes for the first module: one in each row, and with full recomputation every module.
    Here none is the first, and it is done once. Ranks that share matrices or rows agree on the largest values then.
    Forward only, scales and history are afterwards what they were before.
    """
    if not has_delayed_scales(model[0]):
        yield
    elif forward_only:
        before = [(module, module.get_fp8_meta_tensors()) for module in scaled_modules(model)]
        try:
            yield
        finally:
            for module, saved in before:
                module.reset_fp8_meta_tensors(saved)
    else:
        engine = transformer_engine_state()
        with get_fp8_context(get_model_config(model[0])):
            engine.IS_FIRST_FP8_MODULE = False  # inner contexts put it back to this when they end
            yield
            engine.reduce_and_update_fp8_tensors(forward=False)


def transformer_engine_state() -> Any:
    """Transformer Engine's global state of FP8, from where Megatron-Core, too, takes it."""
    from transformer_engine.pytorch.fp8 import FP8GlobalStateManager

    return FP8GlobalStateManager


def forget_scales(model: Sequence[torch.nn.Module]) -> None:
    """Set delayed scales to 1 and forget their history."""
    for module in scaled_modules(model):
        module.reset_fp8_meta_tensors()


def hold_scales(model: Sequence[torch.nn.Module]) -> None:
    """Keep delayed scales as they are for good: those of a reference that stays in memory.

    Transformer Engine updates all modules of a process whenever it updates any. A history that is the largest value throughout
    yields the same scale until it is all zeros, and from then on scales stay.
    """
    for module in scaled_modules(model):
        saved = module.get_fp8_meta_tensors()
        for _, history in (saved or {}).values():
            history.copy_(history.amax(dim=0, keepdim=True).expand_as(history).clone())
        module.reset_fp8_meta_tensors(saved)


def scaled_modules(model: Sequence[torch.nn.Module]) -> list[Any]:
    """The modules that have delayed scales: Transformer Engine's, which all have these two methods."""
    return [module for part in model for module in part.modules() if hasattr(module, "reset_fp8_meta_tensors")]


def keep_exact_weights(part: torch.nn.Module, weights: dict[str, Any]) -> None:
    """Let the optimizer start from the weights that were loaded, not from their FP8 rounding (`model.fp8_params`).

    A parameter in FP8 holds on to the unrounded values it was made of until the optimizer takes them: those of initialisation.
    """
    for name, parameter in part.named_parameters():
        if getattr(parameter, "_high_precision_init_val", None) is not None:
            parameter._high_precision_init_val = weights[name].detach().cpu()  # type: ignore[attr-defined]

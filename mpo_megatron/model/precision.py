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
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.utils import get_model_config
from transformers import PretrainedConfig

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, ParallelConfig, require

AMAX_HISTORY = 1024
"""Steps whose largest values `delayed` looks back on: Transformer Engine's own default."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A way to choose scales."""

    megatron: str
    """Megatron-Core's name of it (`fp8_recipe`)."""
    format: str
    """`e4m3` for all tensors, or `hybrid`: e5m2 for gradients. What Transformer Engine does by default with this recipe."""
    tokens: int
    """The tokens of each rank's part of a row are a multiple of this, as the weight gradient's product sums over them."""
    channels: int
    """Both dimensions of each rank's part of a weight matrix are multiples of this."""
    availability: str
    """Function of transformer_engine.pytorch that says whether this GPU has it, and else why not."""


RECIPES = {
    "delayed": Recipe(megatron="delayed", format="hybrid", tokens=16, channels=16, availability="is_fp8_available"),
    "current": Recipe(megatron="tensorwise", format="hybrid", tokens=16, channels=16, availability="is_fp8_available"),
    "blockwise": Recipe(
        megatron="blockwise", format="e4m3", tokens=128, channels=16, availability="is_fp8_block_scaling_available"
    ),
    "mxfp8": Recipe(megatron="mxfp8", format="e4m3", tokens=32, channels=32, availability="is_mxfp8_available"),
}
"""The recipes by the name that `model.fp8` takes."""

TOKEN_MULTIPLE = 16
"""Tokens of a rank's part of a row without FP8: what sequence parallelism and tensor cores like."""


def token_multiple(model: ModelConfig) -> int:
    """Each rank's part of a row has a multiple of this many tokens."""
    return TOKEN_MULTIPLE if model.fp8 == "none" else RECIPES[model.fp8].tokens


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


def validate_fp8_layout(model: ModelConfig, parallel: ParallelConfig, hf_config: PretrainedConfig) -> None:
    """The part of `validate_fp8` that asks nothing of this machine.

    Raises:
        ConfigError: naming the field, the reason and the fix.
    """
    if model.fp8 == "none":
        return
    recipe, tensor = RECIPES[model.fp8], parallel.tensor
    head = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // hf_config.num_attention_heads
    queries, keys = (heads * head // tensor for heads in (hf_config.num_attention_heads, hf_config.num_key_value_heads))
    for what, size in (
        ("hidden_size", hf_config.hidden_size),
        ("intermediate_size", hf_config.intermediate_size // tensor),
        ("width of queries, keys and values", queries + 2 * keys),
        ("width of the attention's output", queries),
    ):
        require(
            size % recipe.channels == 0,
            f"model.fp8 = {model.fp8} multiplies matrices whose sides are multiples of {recipe.channels}, but the model's {what} "
            f"is {size} on each of {tensor} tensor-parallel ranks; choose a smaller parallel.tensor, or set model.fp8 to none.",
        )
    require(
        not parallel.sequence_parallel or hf_config.hidden_size % recipe.tokens == 0,
        f"model.fp8 = {model.fp8} exchanges activations in blocks of {recipe.tokens} channels between tensor-parallel ranks, and "
        f"the model's hidden_size is {hf_config.hidden_size}; set parallel.sequence to false, or choose another recipe.",
    )
    layers = hf_config.num_hidden_layers // parallel.pipeline
    require(
        model.fp8_bf16_layers <= layers,
        f"model.fp8_bf16_layers = {model.fp8_bf16_layers} is more than the {layers} layers of a pipeline stage; lower it, or "
        "lower parallel.pipeline.",
    )


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

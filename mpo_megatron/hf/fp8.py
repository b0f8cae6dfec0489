"""FP8 recipes, and what they ask of rows and models; model/precision.py says what they do."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family


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


def validate_fp8_layout(model: ModelConfig, parallel: ParallelConfig, family: Family) -> None:
    """The part of `validate_fp8` that asks nothing of this machine.

    Raises:
        ConfigError: naming the field, the reason and the fix.
    """
    if model.fp8 == "none":
        return
    recipe, tensor = RECIPES[model.fp8], parallel.tensor
    queries, keys = family.queries // tensor, family.keys // tensor
    gates, net = queries if family.output_gate else 0, family.delta_net
    sizes = [
        ("hidden_size", family.hidden_size),
        ("intermediate_size", family.intermediate_size // tensor),
        ("width of queries, keys and values", queries + gates + 2 * keys),
        ("width of the attention's output", queries),
    ]
    if net is not None:
        sizes += [
            ("width of linear_attention's inputs", net.inputs // tensor),
            ("width of linear_attention's output", net.values // tensor),
        ]
    for what, size in sizes:
        require(
            size % recipe.channels == 0,
            f"model.fp8 = {model.fp8} multiplies matrices whose sides are multiples of {recipe.channels}, but the model's {what} "
            f"is {size} on each of {tensor} tensor-parallel ranks; choose a smaller parallel.tensor, or set model.fp8 to none.",
        )
    require(
        not parallel.sequence_parallel or family.hidden_size % recipe.tokens == 0,
        f"model.fp8 = {model.fp8} exchanges activations in blocks of {recipe.tokens} channels between tensor-parallel ranks, and "
        f"the model's hidden_size is {family.hidden_size}; set parallel.sequence to false, or choose another recipe.",
    )
    layers = family.num_hidden_layers // parallel.pipeline
    require(
        model.fp8_bf16_layers <= layers,
        f"model.fp8_bf16_layers = {model.fp8_bf16_layers} is more than the {layers} layers of a pipeline stage; lower it, or "
        "lower parallel.pipeline.",
    )

"""FP8 recipes, and their requirements on rows and models; model/precision.py describes the recipes."""

from __future__ import annotations

from dataclasses import dataclass

from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """An FP8 scaling recipe."""

    megatron: str
    """Megatron-Core's name (`fp8_recipe`)."""
    format: str
    """`e4m3` for all tensors, or `hybrid`: e5m2 for gradients. Transformer Engine's default for this recipe."""
    tokens: int
    """Each rank's part of a row must have a multiple of this many tokens, over which the weight gradient's product sums."""
    channels: int
    """Both dimensions of each rank's shard of a weight matrix must be multiples of this."""
    availability: str
    """Function of transformer_engine.pytorch that reports whether this GPU supports it, and why not."""


RECIPES = {
    "current": Recipe(megatron="tensorwise", format="hybrid", tokens=16, channels=16, availability="is_fp8_available"),
    "blockwise": Recipe(
        megatron="blockwise", format="e4m3", tokens=128, channels=16, availability="is_fp8_block_scaling_available"
    ),
    "mxfp8": Recipe(megatron="mxfp8", format="e4m3", tokens=32, channels=32, availability="is_mxfp8_available"),
}
"""Recipes by their value of `model.fp8`."""

TOKEN_MULTIPLE = 16
"""Multiple of tokens per rank without FP8: suits sequence parallelism and tensor cores."""


def token_multiple(model: ModelConfig) -> int:
    """The multiple of tokens that each rank's part of a row must have."""
    return TOKEN_MULTIPLE if model.fp8 == "none" else RECIPES[model.fp8].tokens


def validate_fp8_layout(model: ModelConfig, parallel: ParallelConfig, family: Family) -> None:
    """The part of `validate_fp8` that does not depend on this machine.

    Raises:
        ConfigError: names the field, the reason and the fix.
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

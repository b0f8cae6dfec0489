"""Checks that a model's layers support the recomputation and offloading of `model`."""

from __future__ import annotations

from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family


def validate_recompute(model: ModelConfig, parallel: ParallelConfig, family: Family, *, from_engine: bool) -> None:
    """Check that the model's layers have each of `model.recompute_modules`, and can offload `model.offload_layers`.

    Args:
        from_engine: whether layers are Transformer Engine's

    Raises:
        ConfigError: names the module or the field, the reason and the fix.
    """
    refused = _refused(family, from_engine=from_engine) if model.recompute == "selective" else {}
    for module in model.recompute_modules:
        require(module not in refused, f"model.recompute_modules has {module}, but {refused.get(module)}.")
    if not model.offload_layers:
        return
    named, layers = f"model.offload_layers = {model.offload_layers}", family.num_hidden_layers
    require(
        model.offload_layers < layers,
        f"{named}, but the model has {layers} layers, and the last layer's activations are needed at once; set it to "
        f"{layers - 1} or less.",
    )
    require(
        parallel.pipeline == 1,
        f"{named} with parallel.pipeline = {parallel.pipeline}: a stage runs other rows before a row's backward pass; set "
        "parallel.pipeline to 1, or model.offload_layers to 0.",
    )


def _refused(family: Family, *, from_engine: bool) -> dict[str, str]:
    """Modules that cannot be recomputed, with the reason and the fix."""
    refused = {}
    if family.experts is not None and family.experts.everywhere:
        refused["mlp"] = "all layers of the model have experts; use moe instead"
    if not from_engine:
        refused |= dict.fromkeys(("layernorm", "moe_act"), "Megatron-Core recomputes it with Transformer Engine only; remove it")
    elif family.experts is None:
        refused["layernorm"] = "Transformer Engine computes these norms within the products that follow them; remove it"
    if family.experts is None:
        refused |= dict.fromkeys(("moe", "moe_act", "shared_experts"), "the model has no experts; remove it")
    elif not family.shared_ffn:
        refused["shared_experts"] = "the model has no shared expert; remove it"
    return refused

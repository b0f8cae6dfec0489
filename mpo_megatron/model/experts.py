"""Mixture-of-experts layers: their settings for Megatron-Core.

A router sends each token to `per_token` of the layer's experts, those with the largest softmax probabilities; their outputs are
summed, weighted by the probabilities. Some models add a shared expert for all tokens, with its own gate. No token is dropped and
no auxiliary loss is added: a group's loss and gradients are those of `transformers`, on any layout of experts.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions import transformer_engine

from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family


def expert_settings(family: Family, model: ModelConfig, parallel: ParallelConfig, *, from_engine: bool) -> dict[str, Any]:
    """Settings of experts for Megatron-Core's TransformerConfig.

    Raises:
        ConfigError: FP8 is set for a model with experts.
    """
    # With the default dispatcher, Megatron refuses rows of different lengths, even for a dense model, which does not use it.
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    experts = family.experts
    if experts is None:
        return settings
    require(
        model.fp8 == "none",
        # Megatron-Core would pad each expert's tokens for FP8. Missing here: checks of the experts' sizes, and tests that
        # scales, FP8 weights and their checkpoints stay correct when experts move to other ranks.
        f"model.fp8 = {model.fp8}: FP8 is for models without experts: with them its scales and checkpoints are untested; set "
        "model.fp8 to none.",
    )
    if not experts.everywhere:
        settings["moe_layer_freq"] = [int(sparse) for sparse in experts.layers]
    return settings | {
        "num_moe_experts": experts.num,
        "moe_ffn_hidden_size": experts.channels,
        "moe_router_topk": experts.per_token,
        # The softmax over the chosen experts' logits equals that over all, divided by the chosen experts' sum.
        "moe_router_pre_softmax": not experts.normalized,
        "moe_router_dtype": "fp32",
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": experts.shared_channels,
        "moe_shared_expert_gate": experts.shared_channels is not None,
        "moe_grouped_gemm": from_engine,
        **(fused_kernels() if from_engine else {}),
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
    }


PERMUTE_KERNELS = (
    *("fused_permute", "fused_permute_with_probs", "fused_unpermute"),
    *("fused_sort_chunks_by_index", "fused_sort_chunks_by_index_with_probs"),
)
"""Transformer Engine's kernels that sort tokens by expert and back, under Megatron-Core's names; None if it lacks one."""


def fused_kernels() -> dict[str, bool]:
    """Settings for kernels that Transformer Engine fuses: sorting tokens by expert, and softmax with the choice of experts."""

    def present(*names: str) -> bool:
        return all(getattr(transformer_engine, name, None) is not None for name in names)

    return {
        "moe_permute_fusion": present(*PERMUTE_KERNELS),
        "moe_router_fusion": present("fused_topk_with_score_function"),
    }


def mark_experts(part: torch.nn.Module) -> None:
    """Make DistributedDataParallel reduce the gradients of experts over all ranks that hold the same ones.

    Megatron-Core does so only with expert parallelism. Without it, it reduces over the ranks with the same shard of the dense
    layers. If experts are sharded less than those, several tensor-parallel ranks hold the same expert, see different tokens, and
    would keep different gradients.
    """
    for name, parameter in part.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]  # not with the dense layers': a buffer of their own

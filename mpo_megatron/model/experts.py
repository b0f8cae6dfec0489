"""Mixture-of-experts layers: how Megatron-Core is to compute them.

A router gives each token `per_token` of the layer's experts, by the largest softmax probabilities, and their outputs are added,
weighted by the probabilities. Some models add a shared expert that sees all tokens, through a gate of its own. No token is
dropped and no auxiliary loss is added: a group's loss and gradients are those of `transformers`, wherever its experts lie.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.extensions import transformer_engine
from megatron.core.transformer.moe import moe_utils

from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family


def expert_settings(family: Family, model: ModelConfig, parallel: ParallelConfig, *, from_engine: bool) -> dict[str, Any]:
    """Settings of experts for Megatron-Core's TransformerConfig.

    Raises:
        ConfigError: experts in FP8.
    """
    # With the default dispatcher, which a dense model does not use either, Megatron refuses rows of different lengths.
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    experts = family.experts
    if experts is None:
        return settings
    require(
        model.fp8 == "none",
        # Megatron-Core would pad each expert's tokens to what FP8 takes. What is missing here: checks of the experts' sizes, and
        # evidence that scales, weights in FP8 and their checkpoints are right when experts move to other ranks.
        f"model.fp8 = {model.fp8}: FP8 is for models without experts: with them its scales and checkpoints are untested; set "
        "model.fp8 to none.",
    )
    if not hasattr(moe_utils, "te_general_gemm"):  # Megatron-Core 0.16 looks at it without Transformer Engine, too
        moe_utils.te_general_gemm = None
    if not experts.everywhere:
        settings["moe_layer_freq"] = [int(sparse) for sparse in experts.layers]
    return settings | {
        "num_moe_experts": experts.num,
        "moe_ffn_hidden_size": experts.channels,
        "moe_router_topk": experts.per_token,
        # The softmax over a token's own experts' logits is that over all of them, divided by its experts' sum.
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
"""Transformer Engine's kernels that sort tokens by expert and back, by Megatron-Core's names; None where it lacks one."""


def fused_kernels() -> dict[str, bool]:
    """Settings for what Transformer Engine fuses: sorting tokens by expert, and softmax with the choice of experts."""

    def present(*names: str) -> bool:
        return all(getattr(transformer_engine, name, None) is not None for name in names)

    return {
        "moe_permute_fusion": present(*PERMUTE_KERNELS),
        "moe_router_fusion": present("fused_topk_with_score_function"),
    }


def mark_experts(part: torch.nn.Module) -> None:
    """Have the gradients of experts reduced over all ranks that hold the same ones.

    Megatron-Core does so with expert parallelism only. Without it, it takes the ranks with the same part of the dense layers:
    others where an expert is cut less than these: then several tensor-parallel ranks hold the same expert, see other tokens, and
    each would keep its own gradient.
    """
    for name, parameter in part.named_parameters():
        if ".mlp.experts." in name:
            parameter.allreduce = False  # type: ignore[attr-defined]  # not with the dense layers': a buffer of their own

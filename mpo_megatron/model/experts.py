"""Mixture-of-experts layers of Qwen2-MoE and Qwen3-MoE: what config.json says of them, and how Megatron-Core is to compute them.

A router gives each token `per_token` of the layer's experts, by the largest softmax probabilities, and their outputs are added,
weighted by the probabilities. Qwen2-MoE adds a shared expert that sees all tokens, through a gate of its own. No token is dropped
and no auxiliary loss is added: a group's loss and gradients are those of `transformers`, wherever its experts lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.moe import moe_utils
from transformers import PretrainedConfig

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, ParallelConfig, require


@dataclass(frozen=True, kw_only=True)
class Experts:
    """The experts of a model."""

    num: int
    """Experts of a layer."""
    per_token: int
    """Experts that a token goes to."""
    channels: int
    """Intermediate size of an expert."""
    shared_channels: int | None
    """Intermediate size of the shared expert; None without one."""
    normalized: bool
    """Whether a token's probabilities are made to sum to 1 over its experts."""
    layers: tuple[bool, ...]
    """Which layers have experts; the others have a dense MLP."""

    @property
    def everywhere(self) -> bool:
        """Whether all layers have experts. Megatron's checkpoints stack the layers' tensors if so."""
        return all(self.layers)


def read_experts(hf_config: PretrainedConfig) -> Experts | None:
    """The experts that config.json describes; None for a dense model."""
    if not hf_config.model_type.endswith("_moe"):
        return None
    dense, every = set(hf_config.mlp_only_layers or ()), hf_config.decoder_sparse_step
    return Experts(
        num=hf_config.num_experts,
        per_token=hf_config.num_experts_per_tok,
        channels=hf_config.moe_intermediate_size,
        shared_channels=hf_config.shared_expert_intermediate_size if hf_config.model_type == "qwen2_moe" else None,
        normalized=hf_config.norm_topk_prob,
        layers=tuple(layer not in dense and (layer + 1) % every == 0 for layer in range(hf_config.num_hidden_layers)),
    )


def check_supported(hf_config: PretrainedConfig) -> None:
    """Refuse experts that would be computed differently from `transformers`.

    Raises:
        ConfigError: naming the field of config.json and the rule.
    """
    experts = read_experts(hf_config)
    if experts is None:
        return
    require(
        experts.num >= 1 and any(experts.layers),
        f"config.json: num_experts = {experts.num}, decoder_sparse_step = {hf_config.decoder_sparse_step}, mlp_only_layers = "
        f"{hf_config.mlp_only_layers}: no layer has experts; as a dense model it is {hf_config.model_type.removesuffix('_moe')}.",
    )
    require(
        1 <= experts.per_token <= experts.num,
        f"config.json: num_experts_per_tok = {experts.per_token} of num_experts = {experts.num}; is config.json damaged?",
    )
    require(
        experts.per_token > 1 or not experts.normalized,
        "config.json: num_experts_per_tok = 1 with norm_topk_prob = true: the only probability is always 1, so the router cannot "
        "learn, and Megatron-Core refuses it.",
    )
    require(
        getattr(hf_config, "qkv_bias", True),
        "config.json: qkv_bias = false is not implemented for qwen2_moe; published models have true.",
    )


def validate_layout(hf_config: PretrainedConfig, parallel: ParallelConfig) -> None:
    """Check that the experts can be cut as `parallel` asks.

    Raises:
        ConfigError: naming the field, the rule and the values that work.
    """
    experts = read_experts(hf_config)
    if experts is None:
        for name in ("expert", "expert_tensor"):
            require(
                getattr(parallel, name) == 1,
                f"parallel.{name} = {getattr(parallel, name)}, but a {hf_config.model_type} has no experts; leave it out.",
            )
        return
    require(
        parallel.tensor == 1 or parallel.sequence_parallel,
        f"parallel.sequence = false with parallel.tensor = {parallel.tensor}: every rank would send every token to the experts; "
        "leave parallel.sequence out.",
    )
    require(
        parallel.expert == 1 or parallel.expert_tensor == 1 or device.has_gpu(),
        f"parallel.expert = {parallel.expert} with parallel.expert_tensor = {parallel.expert_tensor} gathers parts of different "
        "length, which gloo, on a machine without a GPU, cannot; set one of them to 1.",
    )
    divisible = [("expert", "num_experts", experts.num), ("expert_tensor", "moe_intermediate_size", experts.channels)]
    if experts.shared_channels is not None:
        divisible.append(("tensor", "shared_expert_intermediate_size", experts.shared_channels))
    for name, what, size in divisible:
        number = getattr(parallel, name)
        choices = ", ".join(str(n) for n in range(1, min(size, 128) + 1) if size % n == 0)
        require(
            size % number == 0,
            f"parallel.{name} = {number} does not divide the model's {what} = {size}; choose one of {choices}.",
        )


def expert_settings(
    hf_config: PretrainedConfig, model: ModelConfig, parallel: ParallelConfig, *, transformer_engine: bool
) -> dict[str, Any]:
    """What Megatron-Core's TransformerConfig is told of experts.

    Raises:
        ConfigError: experts in FP8.
    """
    # With the default dispatcher, which a dense model does not use either, Megatron refuses rows of different lengths.
    settings: dict[str, Any] = {"moe_token_dispatcher_type": "alltoall"}
    experts = read_experts(hf_config)
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
        "moe_grouped_gemm": transformer_engine,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor,
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

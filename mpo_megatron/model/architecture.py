"""Convert a model's features to Megatron-Core's TransformerConfig; model/layers.py builds its layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.transformer_config import TransformerConfig

from mpo_megatron import device
from mpo_megatron.config import ModelConfig, ParallelConfig, require
from mpo_megatron.families import Family
from mpo_megatron.model.attention_backends import choose_attention
from mpo_megatron.model.delta_backends import choose_delta_rule
from mpo_megatron.model.elementwise import gelu_tanh
from mpo_megatron.model.experts import expert_settings
from mpo_megatron.model.precision import fp8_settings, missing_for_transformer_engine
from mpo_megatron.model.recompute import offload_settings, recompute_settings
from mpo_megatron.stack.checks import has_fused_gradients

ACTIVATIONS = {"silu": F.silu, "gelu_tanh": gelu_tanh}
"""`Family.activation` → the MLP's activation function."""

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
"""Compute dtype of each `model.precision`."""


def use_transformer_engine(model: ModelConfig) -> bool:
    """Whether layers come from Transformer Engine.

    Raises:
        ConfigError: it is requested but not installed, or there is no GPU.
    """
    if model.backend == "local":
        return False
    missing = missing_for_transformer_engine()
    require(
        model.backend == "auto" or missing is None,
        f"model.backend = transformer_engine, but {missing}. Or set model.backend to local.",
    )
    return missing is None


def resolve_model(model: ModelConfig, family: Family) -> ModelConfig:
    """The same options, with `backend`, `attention` and `delta_rule` resolved for this machine.

    Raises:
        ConfigError: something requested is missing here.
    """
    engine = use_transformer_engine(model)
    attention = choose_attention(model, capped=family.score_cap is not None)
    chosen: dict[str, Any] = {"attention": attention, "delta_rule": choose_delta_rule(model, family)}
    return replace(model, backend="transformer_engine" if engine else "local", **chosen)


def build_transformer_config(family: Family, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron-Core's TransformerConfig for this model, precision and layout."""
    dtype, engine = DTYPES[model.precision], use_transformer_engine(model)
    return TransformerConfig(
        num_layers=family.num_hidden_layers,
        hidden_size=family.hidden_size,
        ffn_hidden_size=family.intermediate_size,
        num_attention_heads=family.num_attention_heads,
        num_query_groups=family.num_key_value_heads,
        kv_channels=family.head_dim,
        normalization="RMSNorm",
        layernorm_zero_centered_gamma=family.norm_offset,
        layernorm_epsilon=family.rms_norm_eps,
        gated_linear_unit=True,
        activation_func=ACTIVATIONS[family.activation],
        add_bias_linear=False,
        add_qkv_bias=family.qkv_bias,
        qk_layernorm=family.qk_norm == "head",
        attention_output_gate=family.output_gate,
        # The layers with a Gated DeltaNet; Megatron-Core reads this to decide whether checkpoints can stack layers.
        linear_attention_freq=None if family.delta_net is None else [int(net) for net in family.delta_net.layers],
        hidden_dropout=0.0,
        attention_dropout=0.0,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        num_layers_in_first_pipeline_stage=parallel.first_stage_layers,
        num_layers_in_last_pipeline_stage=parallel.last_stage_layers,
        # In an interleaved schedule a stage exchanges tensors with both neighbours at once. Batched messages between two stages
        # that are both neighbours of each other could mix, so each message is sent separately and waited for when needed.
        overlap_p2p_comm=parallel.virtual_pipeline > 1,
        batch_p2p_comm=parallel.virtual_pipeline == 1,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence_parallel,
        # Rows differ in length, so pipeline stages also exchange the shapes of what they send.
        variable_seq_lengths=parallel.pipeline > 1,
        # Losses are scaled by the global number of groups before backward, so Megatron must sum gradients over data-parallel
        # ranks and micro-batches, not average them: with this flag DDP's gradient_scaling_factor is 1 (see train/step.py).
        calculate_per_token_loss=True,
        # Weights are loaded from a checkpoint, but initialisation marks them as tensor-parallel, and without the mark the
        # gradient norm counts one rank's shards only. So initialisation runs with a function that does nothing.
        perform_initialization=True,
        init_method=_leave_uninitialized,
        output_layer_init_method=_leave_uninitialized,
        bias_activation_fusion=device.has_gpu() and family.activation == "silu",
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        # Weight gradients are added to Megatron's buffers inside the GEMM; for the output layer see Policy.
        gradient_accumulation_fusion=engine or has_fused_gradients(),
        # Transformer Engine's kernel has no factor of the rotated channels.
        apply_rope_fusion=engine and set(family.rotation_factors) == {1.0},
        # GroupAttention is the attention core; of Transformer Engine it may use only cuDNN's kernel. With another value here,
        # Megatron-Core refuses the environment variables that select that kernel (attention_varlen.py).
        attention_backend=AttnBackend.fused,
        **expert_settings(family, model, parallel, from_engine=engine),
        **fp8_settings(model),
        **recompute_settings(model),
        **offload_settings(model),
    )


def _leave_uninitialized(weight: torch.Tensor) -> torch.Tensor:
    return weight

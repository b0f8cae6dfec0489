"""Megatron's DistributedDataParallel, distributed AdamW and learning-rate schedule, set up for a policy."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from mpo_megatron import device
from mpo_megatron.config import OptimizerConfig, require
from mpo_megatron.families import Family
from mpo_megatron.mcore.optimizer_states import follow_parameter_order, fuse_adam
from mpo_megatron.mcore.weights import gather_now
from mpo_megatron.model.parallel import Ranks
from mpo_megatron.model.precision import missing_for_transformer_engine


def wrap_data_parallel(parts: list[torch.nn.Module], config: OptimizerConfig, ranks: Ranks) -> list[torch.nn.Module]:
    """The policy's parts with gradient buffers that are reduced over replicas, in float32."""
    overlap = choose_overlap(config, ranks.groups.dp_cp.size())
    settings = DistributedDataParallelConfig(
        use_distributed_optimizer=True,
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap != "none",
        overlap_param_gather=overlap == "all",
        fp8_param_gather=get_model_config(parts[0]).fp8_param,
    )
    wrapped = []
    for index, part in enumerate(parts):
        get_attr_wrapped_model(
            part, "output_weight_gradient", return_model_obj=True
        ).overlap_grad_reduce = settings.overlap_grad_reduce
        wrapped.append(
            DistributedDataParallel(
                get_model_config(part),
                dataclasses.replace(settings),  # DDP writes to it
                part,
                # Later parts are reduced while earlier ones still compute, so they need no buckets.
                disable_bucketing=index > 0,
                pg_collection=ranks.groups,
            )
        )
        fuse_weight_gradients(part)
    return wrapped


def fuse_weight_gradients(part: torch.nn.Module) -> None:
    """On a CPU, make local layers add weight gradients to their buffers in the GEMM (mcore/cpu.py); on a GPU this needs apex."""
    for module in part.modules():
        if not device.has_gpu() and isinstance(module, ColumnParallelLinear | RowParallelLinear):
            module.gradient_accumulation_fusion = True


def choose_overlap(config: OptimizerConfig, num_sharers: int) -> str:
    """What ranks communicate during computation: `none`, `gradients` or `all`.

    Args:
        num_sharers: number of ranks with the same weights, which exchange gradients
    """
    if config.overlap != "auto":
        return config.overlap
    return "all" if device.has_gpu() and num_sharers > 1 else "none"


def check_offload(config: OptimizerConfig, precision: str, family: Family) -> None:
    """Refuse to offload the optimizer without a GPU, bf16 weights or Transformer Engine's Adam.

    Raises:
        ConfigError: this machine has no GPU, or no Transformer Engine, whose Adam updates the part that stays on the GPU; or the
            weights are float32, whose states Megatron cannot offload.
    """
    if config.cpu_offload == 0:
        return
    require(
        device.has_gpu(),
        f"optimizer.cpu_offload = {config.cpu_offload}, but this machine has no GPU: the optimizer's states already are in host "
        "memory; remove it.",
    )
    missing = missing_for_transformer_engine()
    require(
        missing is None,
        f"optimizer.cpu_offload = {config.cpu_offload} needs the Adam of Transformer Engine, but {missing}. Or remove it.",
    )
    require(
        precision == "bf16",
        f"optimizer.cpu_offload = {config.cpu_offload}, model.precision = {precision}; Megatron offloads the states of bf16 "
        "weights only; set model.precision to bf16, or remove it.",
    )
    require(
        family.delta_net is None,
        f"optimizer.cpu_offload = {config.cpu_offload}: Megatron offloads the states of bf16 weights only, but this model's "
        "layers of linear_attention keep A_log and dt_bias in float32; remove it.",
    )


def build_optimizer(config: OptimizerConfig, model: list[torch.nn.Module], ranks: Ranks) -> MegatronOptimizer:
    """AdamW with float32 states and master weights, sharded over replicas. Load the model's weights first."""
    model_config = get_model_config(model[0])
    settings = MegatronOptimizerConfig(
        optimizer="adam",
        lr=config.lr,
        min_lr=config.min_lr,
        weight_decay=config.weight_decay,
        adam_beta1=config.beta1,
        adam_beta2=config.beta2,
        adam_eps=config.eps,
        bf16=model_config.bf16,
        params_dtype=model_config.params_dtype,
        use_distributed_optimizer=True,
        fp8_recipe=model_config.fp8_recipe if model_config.fp8_param else None,
        # An infinite bound clips nothing but still measures the norm.
        clip_grad=config.clip_grad or float("inf"),
        # Master weights and states are float32, offloaded or not. Megatron offloads only with its "precision-aware" optimizer,
        # which leaves master weights to Adam itself.
        optimizer_cpu_offload=config.cpu_offload > 0,
        optimizer_offload_fraction=config.cpu_offload,
        use_precision_aware_optimizer=config.cpu_offload > 0,
        overlap_cpu_optimizer_d2h_h2d=config.cpu_offload > 0,
    )
    optimizer = get_megatron_optimizer(settings, model, use_gloo_process_groups=False, pg_collection=ranks.groups)
    follow_parameter_order(optimizer)
    fuse_adam(optimizer)
    return optimizer


def build_scheduler(
    config: OptimizerConfig, optimizer: MegatronOptimizer, *, total_steps: int, start_step: int
) -> OptimizerParamScheduler:
    """The learning-rate schedule, set for the step `start_step` (0 for a new run); call `step(1)` after each update.

    The rate depends only on the step, so it needs no state in checkpoints. The first step uses the warm-up's first non-zero rate,
    not 0.
    """
    warmup_steps = min(round(config.warmup_fraction * total_steps), total_steps - 1)
    scheduler = OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=config.lr,
        min_lr=config.min_lr,
        lr_warmup_steps=warmup_steps,
        lr_decay_steps=total_steps + 1,  # the rate reaches min_lr after the last step, not in it
        lr_decay_style=config.schedule,
        start_wd=config.weight_decay,
        end_wd=config.weight_decay,
        wd_incr_steps=total_steps,
        wd_incr_style="constant",
    )
    scheduler.step(start_step + 1)
    return scheduler


def gradient_norm(optimizer: MegatronOptimizer) -> float:
    """Global norm of the finished gradients before clipping, for checks before an update."""
    optimizer.prepare_grads()
    return float(optimizer.get_grad_norm())


def update(model: list[torch.nn.Module], optimizer: MegatronOptimizer) -> tuple[bool, float]:
    """One optimizer step on the finished gradients. Returns (whether weights changed, global gradient norm before clipping)."""
    successful, norm, _ = optimizer.step()
    return bool(successful), float(norm)


def gather_weights(model: list[Any]) -> None:
    """Wait until every rank has the updated weights, which `optimizer.overlap: all` defers to the next forward pass.

    Call it before weights are read other than by a forward pass: to save or send them.
    """
    for part in model:
        if part.ddp_config.overlap_param_gather:
            gather_now(part)


def zero_gradients(model: list[Any], optimizer: MegatronOptimizer) -> None:
    """Clear the gradient buffers before a step."""
    for part in model:
        part.zero_grad_buffer()
    optimizer.zero_grad()


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate the next update uses."""
    return float(optimizer.param_groups[0]["lr"])

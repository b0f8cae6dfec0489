"""Megatron's DistributedDataParallel, distributed AdamW and learning-rate schedule, set up for a policy."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.utils import get_model_config

from mpo_megatron.config import OptimizerConfig
from mpo_megatron.model.parallel import Ranks


def wrap_data_parallel(policy: torch.nn.Module, ranks: Ranks) -> torch.nn.Module:
    """The policy with gradient buffers that are reduced over replicas, in float32."""
    settings = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
    return DistributedDataParallel(get_model_config(policy), settings, policy, pg_collection=ranks.groups)


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
        # An infinite bound clips nothing and still measures the norm.
        clip_grad=config.clip_grad or float("inf"),
    )
    return get_megatron_optimizer(settings, model, use_gloo_process_groups=False, pg_collection=ranks.groups)


def build_scheduler(
    config: OptimizerConfig, optimizer: MegatronOptimizer, *, total_steps: int, start_step: int
) -> OptimizerParamScheduler:
    """The learning-rate schedule, set for the step `start_step` (0 for a new run); call `step(1)` after each update.

    The rate depends on the step alone, so it needs no state in checkpoints. The first step trains with the warm-up's first
    non-zero rate, not with 0.
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


def update(model: list[torch.nn.Module], optimizer: MegatronOptimizer) -> tuple[bool, float]:
    """One optimizer step on the finished gradients. Returns (whether weights changed, global gradient norm before clipping)."""
    successful, norm, _ = optimizer.step()
    return bool(successful), float(norm)


def zero_gradients(model: list[Any], optimizer: MegatronOptimizer) -> None:
    """Clear the gradient buffers before a step."""
    for part in model:
        part.zero_grad_buffer()
    optimizer.zero_grad()


def learning_rate(optimizer: MegatronOptimizer) -> float:
    """The learning rate the next update uses."""
    return float(optimizer.param_groups[0]["lr"])

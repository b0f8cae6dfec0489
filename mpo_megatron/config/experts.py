"""Options of models with experts: auxiliary losses of the routers, and the source of expert choices."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from mpo_megatron.config.checks import require
from mpo_megatron.config.values import Section


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Section, prefix="experts."):
    """Routing of models with experts (docs/experts.md). By default, no loss is added, and the policy's routers choose."""

    balance_coeff: float = 0.0
    """Coefficient of the load-balancing loss (Switch Transformer, Eq. 4; summed over layers as in Megatron-Core); 0: off."""
    balance_over: Literal["group", "step"] = "group"
    """Tokens over which loads are balanced: each group's, averaged over groups, or all of a step (two-phase steps)."""
    z_coeff: float = 0.0
    """Coefficient of the router z-loss (ST-MoE, Eq. 5; mean over a step's tokens, summed over layers); 0: off."""
    routing: Literal["free", "replay"] = "free"
    """`free`: the policy's routers choose experts; `replay`: each token goes to the experts that the reference chose for it."""
    measure_drift: bool = False
    """Record the reference's choices to report `router_drift` with free routing too; `replay` always reports it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("balance_coeff", "z_coeff"):
            value = getattr(self, name)
            require(0 <= value < math.inf, f"experts.{name} = {value}; it must be 0 (off) or positive, and finite.")
        require(
            self.balance_over == "group" or self.balance_coeff > 0,
            f"experts.balance_over = {self.balance_over} without the load-balancing loss; set experts.balance_coeff too.",
        )
        require(
            not (self.measure_drift and self.routing == "replay"),
            "experts.measure_drift = true with experts.routing = replay, which always measures it; remove measure_drift.",
        )

    @property
    def has_terms(self) -> bool:
        """Whether routers add to the loss."""
        return self.balance_coeff > 0 or self.z_coeff > 0

    @property
    def needs_choices(self) -> bool:
        """Whether the reference's expert choices are needed."""
        return self.routing == "replay" or self.measure_drift

    @property
    def needs_whole_batch(self) -> bool:
        """Whether loads are balanced over all tokens of a step, so that they must be known before the backward pass."""
        return self.balance_coeff > 0 and self.balance_over == "step"


def validate_experts(experts: ExpertsConfig, *, num_experts: int, loss_step: str) -> None:
    """Refuse options that the model or `loss.step` cannot support.

    Args:
        num_experts: experts per layer; 0 for a dense model
        loss_step: `loss.step`
    Raises:
        ConfigError: names the field and the fix.
    """
    if not num_experts:
        default = ExpertsConfig()
        for name in ("balance_coeff", "z_coeff", "routing", "measure_drift"):
            value = getattr(experts, name)
            require(
                value == getattr(default, name),
                f"experts.{name} = {str(value).lower()}, but the model of model.checkpoint has no experts; remove it.",
            )
    require(
        not (experts.needs_whole_batch and loss_step == "fused"),
        "experts.balance_over = step with loss.step = fused: the step's loads must be known before the backward pass; set "
        "loss.step to auto or two_phase, or experts.balance_over to group.",
    )


def require_no_router_losses(experts: ExpertsConfig) -> None:
    """Refuse routers' losses with an adapter, where routers are frozen.

    Raises:
        ConfigError: names both fields and the fix.
    """
    require(
        not experts.has_terms,
        f"experts.balance_coeff = {experts.balance_coeff}, experts.z_coeff = {experts.z_coeff} with lora: routers are frozen "
        "with adapters; remove both, or train all weights.",
    )

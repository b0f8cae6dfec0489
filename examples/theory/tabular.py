"""Tabular policies: one logit per response of one prompt, so that losses, optima and expectations are exact.

Shapes: R replicates, V responses of the prompt, G groups, K responses per group. Everything is float64 on the
CPU. Every loss is the package's own, by name, through `group_loss`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpo_megatron.losses import group_loss


def compute_tabular_losses(
    name: str,
    logps: Tensor,
    groups: Tensor,
    *,
    reference_logps: Tensor | None = None,
    rewards: Tensor | None = None,
    labels: Tensor | None = None,
    **hyperparameters: Any,
) -> Tensor:
    """Loss [..., G] in nats of each group of a tabular policy; gradient flows into `logps`.

    Args:
        name: a method of `mpo_megatron.losses`.
        logps: [..., V] log π(y), normalised; leading dimensions are replicates that share the groups.
        groups: [G, K] or [..., G, K] int64: which responses each group holds; a response may occur twice.
        reference_logps: [V] log π_ref(y), for methods that have a reference.
        rewards, labels: shaped like `groups`, as `group_loss` reads them.
        hyperparameters: the method's own.
    """
    shape = (*logps.shape[:-1], *groups.shape[-2:])
    index = groups.expand(shape).reshape(-1, math.prod(shape[-2:]))  # [R, G K]

    def flatten(values: Tensor | None) -> Tensor | None:
        return None if values is None else values.expand(shape).reshape(-1, shape[-1])

    losses = group_loss(
        name,
        logps.reshape(-1, logps.shape[-1]).gather(-1, index).reshape(-1, shape[-1]),
        None if reference_logps is None else reference_logps[index].reshape(-1, shape[-1]),
        flatten(rewards),
        labels=flatten(labels),
        **hyperparameters,
    )
    return losses.reshape(shape[:-1])


def minimize(objective: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int = 500) -> Tensor:
    """The minimiser of a smooth convex objective, by L-BFGS with a line search from `start`; detached.

    `objective` maps a tensor like `start` to a scalar. Replicates that do not interact are minimised together
    by adding up their objectives. Where the infimum is not attained, this returns the point reached after
    `max_iterations`.
    """
    parameters = start.detach().clone().requires_grad_(True)
    optimizer: Any = torch.optim.LBFGS(  # Any: torch leaves `step` untyped
        [parameters],
        max_iter=max_iterations,
        tolerance_grad=1e-9,
        tolerance_change=1e-14,
        history_size=30,
        line_search_fn="strong_wolfe",
    )

    def evaluate() -> Tensor:
        value = objective(parameters)
        (parameters.grad,) = torch.autograd.grad(value, parameters)
        return value

    optimizer.step(evaluate)
    return parameters.detach()


def compute_total_variation(first: Tensor, second: Tensor) -> Tensor:
    """½ Σ |p − q| over the last dimension, of two tensors of probabilities."""
    return 0.5 * (first - second).abs().sum(dim=-1)


def list_subsets(num_responses: int, size: int) -> Tensor:
    """[C(V, K), K]: all sets of `size` different responses."""
    return torch.tensor(list(itertools.combinations(range(num_responses), size)))


def list_multisets(num_responses: int, size: int) -> tuple[Tensor, Tensor]:
    """All groups of `size` independent draws, order aside: members [G, K], and log of the number of orders [G].

    The log-probability of a group under independent draws from μ is that number plus Σ log μ(member).
    """
    members = torch.tensor(list(itertools.combinations_with_replacement(range(num_responses), size)))
    counts = torch.nn.functional.one_hot(members, num_responses).sum(dim=-2).double()
    log_orders = math.lgamma(size + 1) - torch.lgamma(counts + 1).sum(dim=-1)
    return members, log_orders


def mark_first(groups: Tensor) -> Tensor:
    """Rewards like `groups`: 1 for each group's first response, 0 for the others: "the first one was preferred"."""
    rewards = torch.zeros(groups.shape, dtype=torch.float64)
    rewards[..., 0] = 1.0
    return rewards


@dataclass(frozen=True, kw_only=True)
class PowerLaw:
    """A fit of y = c · x^slope."""

    slope: float
    """Exponent."""
    standard_error: float
    """Standard error of the exponent, from the points' own standard errors."""
    log_constant: float
    """log c."""

    @property
    def confidence_interval(self) -> tuple[float, float]:
        """95 % interval of the exponent, for normal errors."""
        return self.slope - 1.96 * self.standard_error, self.slope + 1.96 * self.standard_error


def fit_power_law(x: Tensor, y: Tensor, standard_errors: Tensor) -> PowerLaw:
    """Weighted least squares of log y on log x, for independent y with known standard errors (all [N])."""
    log_x, log_y = x.double().log(), y.double().log()
    weights = (y / standard_errors).double() ** 2  # 1 / Var(log y), by the delta method
    centred = log_x - (weights * log_x).sum() / weights.sum()
    precision = (weights * centred**2).sum()
    slope = (weights * centred * log_y).sum() / precision
    log_constant = (weights * (log_y - slope * log_x)).sum() / weights.sum()
    return PowerLaw(slope=slope.item(), standard_error=precision.rsqrt().item(), log_constant=log_constant.item())


def compute_mean_and_error(samples: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over the first dimension and its standard error, from samples [N, ...]."""
    return samples.mean(dim=0), samples.std(dim=0) / math.sqrt(samples.shape[0])

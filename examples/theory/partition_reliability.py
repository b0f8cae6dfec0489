"""MPO, Theorem 2 (proved as Theorem 4 in App. F): a 2-bin partition survives reward noise, a full ranking does not.

Claim. k responses have true scores 1/k apart; the reward model adds Gaussian noise of standard deviation
σ = β/k. Then the upper and the lower half stay separated with probability at least 1 − C(β) for every k,
C(β) = Σ_m m Φ(−m/(√2 β)), while the full order (Plackett–Luce) survives with probability at most
q^⌊(k−1)/2⌋, q = Φ(1/(√2 β)), which decays exponentially in k.

Set-up. Noisy scores are drawn, and split and ranked by the package's own `compute_partition` (`median`: the
two halves; `mean`: the default split) and `compute_rank`. Yardsticks that use neither: the two probabilities
by numerical integration, and the bounds.

Shown. Left: both probabilities against k, Monte Carlo with 95 % intervals on the integrals' curves, and the
bounds. Right: the bounds against β.

What the paper has loose, and what holds:
- "For any fixed β > 0, 1 − C(β) > 0": C(β) exceeds 1 from β ≈ 1.5, where the bound says nothing (the proof
  itself shows C < 1 for β ≤ 1 only). The conclusion is still right: the events "j above i" all increase in
  the same independent variables, so they are positively associated (Harris), and
  Pr ≥ Π_m Φ(m/(√2 β))^m > 0 for every β. This bound is drawn too.
- "σ ≤ β/k" suffices for the halves, but not for the full ranking's decay: its proof needs the pair's
  probability ≤ q, and smaller noise makes it larger. The upper bound needs σ ≥ β/k; at σ = β/(4k) it fails.
- The default `mean` split needs the noisy mean to lie between the halves besides: less reliable, and no more
  dependent on k.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.theory.report import BLUE, GREEN, GREY, ORANGE, build_figure, parse_output, print_table, save_figure
from mpo_megatron.losses import GroupBatch, PartitionParams, compute_partition
from mpo_megatron.losses.partition import PartitionName, compute_rank

NUM_RESPONSES = (2, 4, 8, 16, 32, 64)
BETAS = (0.5, 1.0, 2.0)
GRID_POINTS = 40_001
"""Of the integrals: steps of 0.002 σ or so, for an error far below the Monte Carlo's."""


def normal_cdf(x: Tensor) -> Tensor:
    """Φ(x)."""
    probabilities: Tensor = torch.special.ndtr(x)
    return probabilities


def compute_union_bound(beta: float) -> float:
    """C(β) of the paper's Eq. 21: an upper bound of the halves' failure probability; may exceed 1."""
    gap = torch.arange(1, 2000, dtype=torch.float64)
    return float((gap * normal_cdf(-gap / (math.sqrt(2) * beta))).sum())


def compute_product_bound(beta: float) -> float:
    """Π_m Φ(m/(√2 β))^m: a lower bound of the halves' success probability for every β and k (Harris' inequality)."""
    gap = torch.arange(1, 2000, dtype=torch.float64)
    return float((gap * torch.special.log_ndtr(gap / (math.sqrt(2) * beta))).sum().exp())


def compute_ranking_bound(beta: float, num_responses: int) -> float:
    """q^⌊(k−1)/2⌋ of the paper's Theorem 4 (ii): an upper bound of the full order's probability at σ = β/k."""
    success = float(normal_cdf(torch.tensor(1.0 / (math.sqrt(2) * beta), dtype=torch.float64)))
    return success ** ((num_responses - 1) // 2)


def integrate_halves(beta: float, num_responses: int) -> float:
    """Pr(every score of the lower half < every score of the upper half), by the trapezoid rule.

    ∫ dF(x) Pr(upper half > x), F the distribution of the lower half's maximum; scores in units of 1/k.
    """
    score = torch.arange(1, num_responses + 1, dtype=torch.float64)
    x = torch.linspace(1 - 9 * beta, num_responses + 9 * beta, GRID_POINTS, dtype=torch.float64)
    z = (x.unsqueeze(-1) - score) / beta
    half = num_responses // 2
    lower = normal_cdf(z[:, :half]).prod(dim=-1)
    upper = normal_cdf(-z[:, half:]).prod(dim=-1)
    return float((lower.diff() * 0.5 * (upper[1:] + upper[:-1])).sum())


def integrate_order(beta: float, num_responses: int) -> float:
    """Pr(ŝ_1 < … < ŝ_k), by carrying Pr(ŝ_1 < … < ŝ_i, ŝ_i < x) over a grid from one response to the next."""
    x = torch.linspace(1 - 9 * beta, num_responses + 9 * beta, GRID_POINTS, dtype=torch.float64)
    below = torch.ones_like(x)
    for score in range(1, num_responses + 1):
        steps = normal_cdf((x - score) / beta).diff() * 0.5 * (below[1:] + below[:-1])
        below = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(dim=0)])
    return float(below[-1])


@dataclass(frozen=True, kw_only=True)
class Reliability:
    """Probabilities of a correct outcome for one (β, k), with σ = noise · β/k."""

    beta: float
    num_responses: int
    halves: float
    """Monte Carlo: the `median` partition of noisy scores is the true one."""
    mean_split: float
    """Monte Carlo: so is the `mean` partition."""
    order: float
    """Monte Carlo: so is the full ranking."""
    num_trials: int
    halves_exact: float
    order_exact: float
    union_bound: float
    product_bound: float
    ranking_bound: float

    def compute_error(self, probability: float) -> float:
        """Standard error of a Monte Carlo estimate whose true value is `probability`."""
        return math.sqrt(probability * (1 - probability) / self.num_trials)


def simulate_reliability(beta: float, num_responses: int, num_trials: int, noise: float = 1.0) -> Reliability:
    """One point of the plot: `num_trials` groups of k noisy scores through the package's split and ranking."""
    generator = torch.Generator().manual_seed(1000 * num_responses + round(100 * beta))
    score = torch.arange(1, num_responses + 1, dtype=torch.float64) / num_responses
    sigma = noise * beta / num_responses
    noisy = score + sigma * torch.randn(num_trials, num_responses, dtype=torch.float64, generator=generator)
    valid = torch.ones_like(noisy, dtype=torch.bool)
    batch = GroupBatch(policy_logps=torch.zeros_like(noisy), valid=valid, rewards=noisy)
    truth = torch.arange(num_responses) >= num_responses // 2

    def estimate(partition: PartitionName) -> float:
        positive, _ = compute_partition(batch, PartitionParams(partition=partition))
        return float((positive == truth).all(dim=-1).double().mean())

    true_rank = torch.arange(num_responses).flip(0)  # rank 0 is the highest score
    return Reliability(
        beta=beta,
        num_responses=num_responses,
        halves=estimate("median"),
        mean_split=estimate("mean"),
        order=float((compute_rank(noisy, valid) == true_rank).all(dim=-1).double().mean()),
        num_trials=num_trials,
        halves_exact=integrate_halves(noise * beta, num_responses),
        order_exact=integrate_order(noise * beta, num_responses),
        union_bound=1 - compute_union_bound(beta),
        product_bound=compute_product_bound(beta),
        ranking_bound=compute_ranking_bound(beta, num_responses),
    )


def compute_reliability(num_trials: int = 20_000) -> list[Reliability]:
    """All (β, k) of the plot, at σ = β/k."""
    return [simulate_reliability(beta, k, num_trials) for beta in BETAS for k in NUM_RESPONSES]


def compute_small_noise(num_trials: int = 20_000) -> list[Reliability]:
    """The full ranking at σ = β/(4k), which the theorem's condition σ ≤ β/k includes: above the claimed bound."""
    return [simulate_reliability(1.0, k, num_trials, noise=0.25) for k in NUM_RESPONSES]


def report(points: list[Reliability], small_noise: list[Reliability]) -> None:
    """Print the numbers."""
    headers = ["beta", "k", "halves", "(exact)", "1 - C", "product", "mean split", "full order", "(exact)", "bound"]
    rows = [
        [
            f"{p.beta:g}",
            str(p.num_responses),
            *(f"{v:.4f}" for v in (p.halves, p.halves_exact, p.union_bound, p.product_bound, p.mean_split, p.order)),
            f"{p.order_exact:.2e}",
            f"{p.ranking_bound:.2e}",
        ]
        for p in points
    ]
    print_table("MPO Theorem 2: probability of a correct outcome, sigma = beta / k", headers, rows)
    rows = [[str(p.num_responses), f"{p.order_exact:.4f}", f"{p.ranking_bound:.4f}"] for p in small_noise]
    print_table("Full order at sigma = beta / (4k), beta = 1: above the claimed bound", ["k", "exact", "bound"], rows)


def plot(points: list[Reliability], output: Path) -> Path:
    """Reliability against k, and the bounds against β."""
    figure, (left, right) = build_figure(2)
    for beta, style in zip(BETAS[:2], ("-", "--"), strict=True):
        chosen = [p for p in points if p.beta == beta]
        k = [p.num_responses for p in chosen]
        left.plot(k, [p.halves_exact for p in chosen], style, color=BLUE, label=f"two halves, β = {beta:g}")
        left.plot(k, [p.order_exact for p in chosen], style, color=ORANGE, label=f"full order, β = {beta:g}")
        left.plot(k, [p.ranking_bound for p in chosen], style, color=ORANGE, alpha=0.4, linewidth=1)
        left.axhline(chosen[0].union_bound, linestyle=style, color=BLUE, alpha=0.4, linewidth=1)
        for name, color in (("halves", BLUE), ("order", ORANGE), ("mean_split", GREEN)):
            seen = [p for p in chosen if getattr(p, name) > 0]
            values = [getattr(p, name) for p in seen]
            errors = [1.96 * p.compute_error(value) for p, value in zip(seen, values, strict=True)]
            label = "mean split (default)" if name == "mean_split" and beta == BETAS[0] else None
            left.errorbar([p.num_responses for p in seen], values, errors, fmt="o", color=color, markersize=3.5, label=label)
    left.set(yscale="log", ylim=(1e-5, 1.5), xlabel="responses k", ylabel="probability of a correct outcome")
    left.set_title("noise σ = β/k; pale: the paper's bounds", fontsize=10)
    left.legend(fontsize=7.5)
    betas = [0.1 * step for step in range(1, 31)]
    right.plot(betas, [integrate_halves(beta, 64) for beta in betas], color=BLUE, label="two halves, k = 64")
    right.plot(betas, [compute_product_bound(beta) for beta in betas], color=GREEN, label="Π Φ(m/√2β)^m")
    right.plot(betas, [1 - compute_union_bound(beta) for beta in betas], color=GREY, label="1 − C(β) (paper)")
    right.axhline(0, color="black", linewidth=0.6)
    right.set(xlabel="noise β = σ k", ylabel="probability", ylim=(-0.5, 1.05))
    right.set_title("the paper's bound is empty above β ≈ 1.5", fontsize=10)
    right.legend(fontsize=8)
    return save_figure(figure, output, "partition_reliability")


def run(output: Path) -> Path:
    """Compute, print, draw."""
    points = compute_reliability()
    report(points, compute_small_noise())
    return plot(points, output)


if __name__ == "__main__":
    run(parse_output(__doc__))

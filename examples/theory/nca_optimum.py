"""NCA paper, Theorems 3.2 (InfoNCA) and 4.2 (NCA): the optima of the two losses.

Claims. With groups of K responses drawn from μ: InfoNCA is minimised by r_θ = r/α + C with any C, NCA by
r_θ = r/α − log E_μ e^{r/α}, an absolute value; either way π_θ ∝ μ e^{r/α}.

Set-up. V = 4 responses, μ not uniform. The expectation over groups is exact: a sum over all multisets of K
responses with their multinomial probabilities, each term the package's own `infonca` or `nca` loss. r_θ is
β log(π_θ/μ) with β = 1; NCA's own model π_θ = μ e^{r_θ} need not be normalised (§4.1), so r_θ itself is the
parameter there; elsewhere the policy is a normalised softmax.

Shown. Left: r_θ found by both losses for several starts. InfoNCA's are parallel to r/α, with the start's C; NCA's
agree. Middle: NCA's distance from the theorem's r_θ against K. Right: what β ≠ 1 does.

What the paper has loose, and what holds:
- Theorem 3.2 is exact for the practical loss (Eq. 6) too, at every K: the target softmax(S/α) is the posterior
  of each single group.
- Theorem 4.2 is about Eq. 9, with the true Z = E_μ e^{r/α}. The practical loss (Eq. 11) puts the group's own
  Σ_j e^{r_j/α} in its place, and is minimised by r_θ(y) = log E[K t_i | y_i = y], t_i = softmax(S/α)_i: the
  theorem's value only as K → ∞, with an error falling as 1/K. (Its μ e^{r_θ} is normalised at every K.)
- Both theorems have π_θ ∝ μ e^{r_θ}. With r_θ = β log(π_θ/μ), as the losses are used, InfoNCA's optimum is
  π ∝ μ e^{r/(αβ)}, which is the theorem's only for β = 1. NCA's absolute r_θ is then out of reach of any
  normalised policy (μ e^{r_θ/β} does not sum to 1): its optimum is a compromise, and not ∝ μ e^{r/(αβ)}.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.theory.report import BLUE, GREEN, GREY, ORANGE, build_figure, label_ticks, parse_output, print_table, save_figure
from examples.theory.tabular import compute_tabular_losses, compute_total_variation, list_multisets, minimize

REWARDS = torch.tensor([0.0, 0.4, 0.7, 1.0], dtype=torch.float64)
REFERENCE = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64).log()
"""log μ."""
ALPHA = 0.5
NUM_RESPONSES = 4
GROUP_SIZES = (2, 4, 8, 16, 32)
BETAS = (0.25, 0.5, 1.0, 2.0)
NUM_STARTS = 5


@dataclass(frozen=True, kw_only=True)
class Optima:
    """The plot's numbers."""

    infonca: dict[int, Tensor]
    """K → r_θ [R, V] found from R starts, β = 1."""
    nca: dict[int, Tensor]
    """K → r_θ [R, V] found from R starts, β = 1, unnormalised model."""
    infonca_scaled: dict[float, Tensor]
    """β → policy [V] found by InfoNCA, K = 4."""
    nca_scaled: dict[float, Tensor]
    """β → policy [V] found by NCA, K = 16, normalised model."""


def compute_target_rewards() -> Tensor:
    """r/α − log E_μ e^{r/α} [V]: NCA's optimum of Theorem 4.2, and InfoNCA's up to a constant."""
    scaled = REWARDS / ALPHA
    return scaled - torch.logsumexp(REFERENCE + scaled, dim=-1)


def compute_tilted_policy(beta: float) -> Tensor:
    """μ e^{r/(αβ)} [V], normalised."""
    return torch.softmax(REFERENCE + REWARDS / (ALPHA * beta), dim=-1)


def compute_finite_rewards(group_size: int) -> Tensor:
    """log E[K t_i | y_i = y] [V]: where the derivative of Eq. 11's expectation vanishes; no loss is called."""
    others, log_orders = list_multisets(NUM_RESPONSES, group_size - 1)
    probabilities = (log_orders + REFERENCE[others].sum(dim=-1)).exp()
    weights = (REWARDS / ALPHA).exp()
    shares = weights / (weights + weights[others].sum(dim=-1, keepdim=True))  # [G, V]
    return (group_size * probabilities @ shares).log()


def compute_objective(name: str, logps: Tensor, group_size: int, beta: float) -> Tensor:
    """Population loss [...] of log-probabilities [..., V], normalised or not."""
    groups, log_orders = list_multisets(NUM_RESPONSES, group_size)
    probabilities = (log_orders + REFERENCE[groups].sum(dim=-1)).exp()
    losses = compute_tabular_losses(
        name, logps, groups, reference_logps=REFERENCE, rewards=REWARDS[groups], alpha=ALPHA, beta=beta
    )
    return (probabilities * losses).sum(dim=-1)


def draw_starts() -> Tensor:
    """[R, V] log-probabilities (up to a constant) to start from."""
    generator = torch.Generator().manual_seed(11)
    return REFERENCE + torch.randn(NUM_STARTS, NUM_RESPONSES, dtype=torch.float64, generator=generator)


def find_rewards(name: str, group_size: int) -> Tensor:
    """r_θ [R, V] = log(π_θ/μ) at the minimum from each start, β = 1, π_θ = μ e^{r_θ} free of normalisation."""
    found = minimize(lambda logps: compute_objective(name, logps, group_size, 1.0).sum(), draw_starts())
    return found - REFERENCE


def find_policy(name: str, group_size: int, beta: float) -> Tensor:
    """The normalised policy [V] at the minimum."""
    found = minimize(lambda logits: compute_objective(name, torch.log_softmax(logits, dim=-1), group_size, beta).sum(), REFERENCE)
    return torch.softmax(found, dim=-1)


def compute_optima() -> Optima:
    """All minimisations. InfoNCA's optimum does not depend on K, so small groups are enough."""
    return Optima(
        infonca={size: find_rewards("infonca", size) for size in GROUP_SIZES[:3]},
        nca={size: find_rewards("nca", size) for size in GROUP_SIZES},
        infonca_scaled={beta: find_policy("infonca", 4, beta) for beta in BETAS},
        nca_scaled={beta: find_policy("nca", 16, beta) for beta in BETAS},
    )


def compute_offsets(rewards: Tensor) -> Tensor:
    """C [R]: mean of r_θ − r/α over the responses."""
    return (rewards - REWARDS / ALPHA).mean(dim=-1)


def report(result: Optima) -> None:
    """Print the numbers."""
    rows = []
    for size, found in result.infonca.items():
        offsets = compute_offsets(found)
        shape = (found - REWARDS / ALPHA - offsets.unsqueeze(-1)).abs().max()
        policy = torch.softmax(REFERENCE + found, dim=-1)
        distance = compute_total_variation(policy, compute_tilted_policy(1.0)).max()
        rows.append([str(size), f"{shape:.1e}", f"{distance:.1e}", f"{offsets.min():.2f} .. {offsets.max():.2f}"])
    headers = ["K", "max |r_theta - r/alpha - C|", "max TV to mu e^{r/alpha}", "C over starts"]
    print_table("Theorem 3.2: InfoNCA", headers, rows)
    rows = []
    for size, found in result.nca.items():
        spread = (found.max(dim=0).values - found.min(dim=0).values).max()
        rows.append(
            [
                str(size),
                f"{spread:.1e}",
                f"{(found - compute_finite_rewards(size)).abs().max():.1e}",
                f"{(found - compute_target_rewards()).abs().max():.4f}",
                f"{(REFERENCE + found).exp().sum(dim=-1).max():.6f}",
            ]
        )
    headers = ["K", "spread over starts", "to log E[K t|y]", "to the theorem", "sum of mu e^r"]
    print_table("Theorem 4.2: NCA, largest difference of r_theta", headers, rows)
    rows = []
    for beta in BETAS:
        tilted = compute_tilted_policy(beta)
        distances = (compute_total_variation(found[beta], tilted) for found in (result.infonca_scaled, result.nca_scaled))
        normalizer = (REFERENCE + compute_target_rewards() / beta).exp().sum()
        rows.append([f"{beta:g}", *(f"{distance:.1e}" for distance in distances), f"{normalizer:.3f}"])
    headers = ["beta", "infonca, K = 4", "nca, K = 16", "sum of mu e^{r*/beta}"]
    print_table("TV of the normalised optimum to mu e^{r / (alpha beta)}", headers, rows)


def plot(result: Optima, output: Path) -> Path:
    """Rewards found; NCA's error against K; policies against β."""
    figure, (left, middle, right) = build_figure(3)
    target = compute_target_rewards()
    for found in result.infonca[8]:
        left.plot(REWARDS, found, "o-", color=ORANGE, markersize=4, linewidth=0.8)
    left.plot([], [], "o-", color=ORANGE, label=f"infonca, K = 8, {NUM_STARTS} starts")
    left.plot(REWARDS, result.nca[32].mean(dim=0), "o", color=BLUE, label=f"nca, K = 32, {NUM_STARTS} starts")
    left.plot(REWARDS, result.nca[2].mean(dim=0), "s", color=GREEN, label=f"nca, K = 2, {NUM_STARTS} starts")
    left.plot(REWARDS, target, "--", color="black", linewidth=1, label="r/α − log E e^{r/α}")
    left.set(xlabel="reward r", ylabel="r_θ at the optimum")
    left.legend(fontsize=8)
    sizes = list(result.nca)
    errors = [(result.nca[size] - target).abs().max() for size in sizes]
    middle.plot(sizes, errors, "o", color=BLUE, label="nca's optimum")
    curve = [(compute_finite_rewards(size) - target).abs().max() for size in sizes]
    middle.plot(sizes, curve, color=BLUE, linewidth=1, label="log E[K t | y], no loss called")
    middle.plot(sizes, [errors[-1] * sizes[-1] / size for size in sizes], "--", color=GREY, label="∝ 1/K")
    middle.set(xscale="log", yscale="log", xlabel="group size K", ylabel="max |r_θ − theorem|")
    label_ticks(middle.xaxis, sizes)
    label_ticks(middle.yaxis, [0.05, 0.1, 0.2, 0.5])
    middle.legend(fontsize=8)
    best = [float(compute_tilted_policy(beta)[-1]) for beta in BETAS]
    right.plot(BETAS, best, "--", color="black", linewidth=1, label="μ e^{r/(αβ)}")
    right.plot(BETAS, [float(result.infonca_scaled[beta][-1]) for beta in BETAS], "o", color=ORANGE, label="infonca")
    right.plot(BETAS, [float(result.nca_scaled[beta][-1]) for beta in BETAS], "s", color=BLUE, label="nca, K = 16")
    right.axhline(float(compute_tilted_policy(1.0)[-1]), linestyle=":", color=GREY, label="μ e^{r/α} (theorem)")
    right.set(xscale="log", xlabel="β", ylabel="π(best) of the normalised optimum")
    label_ticks(right.xaxis, BETAS)
    right.legend(fontsize=8)
    return save_figure(figure, output, "nca_optimum")


def run(output: Path) -> Path:
    """Compute, print, draw."""
    result = compute_optima()
    report(result)
    return plot(result, output)


if __name__ == "__main__":
    run(parse_output(__doc__))

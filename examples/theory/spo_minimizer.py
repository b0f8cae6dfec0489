"""SPO, Theorem 1 (and 2–4): the tabular minimiser of the preference loss is softmax(r / α).

Claim. Pairs (winner, loser) drawn with full support and labelled by a Bradley–Terry judge with rewards r: then
for every α > 0 the loss has the unique minimiser softmax(r / α), from every start; a symmetric positive weight
μ does not move it (Theorem 2), nor do the best-of-n (Theorem 3) and ranked (Theorem 4) forms.

Set-up. V = 6 responses; the population loss is an exact sum over all labelled pairs (triples, rankings) with
their probabilities, each term the package's own `spo` loss: `form = pairs`, `gamma = 0`, on the response's
log-probability itself (SPO has no reference in this term). How often a pair is compared is arbitrary: here it
differs between pairs by a factor of up to 20. Minimised by L-BFGS from random logits.

Shown. Left: the learned policies for several α on softmax(r / α). Middle: distance to it along plain gradient
descent from 20 starts, down to rounding. Right: what happens where the conditions fail.

What the paper has loose, and what holds:
- The data must say how *often* y beats y', both orders present. Where the higher reward always wins (pairs
  made from a reward model's scores, as in `best_worst`), the data are not consistent with Bradley–Terry: the
  loss has no minimiser, and α only sets the speed at which the policy becomes deterministic.
- "For any α ≥ 0 … argmax r for α = 0": at α = 0 the loss (Eq. 10) is −½ Σ_y c_y log π(y), c_y the expected
  wins minus losses of y. It is unbounded below, so it has no minimiser, and gradient descent on logits goes
  to argmax c, which is argmax r if all pairs are equally frequent, and need not be otherwise: in the last row
  the second best response, compared mostly with bad ones, wins. (The proof's Eq. 20, π* = z (π*_α)^α, has no
  meaning at α = 0.)
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.theory.report import BLUE, GREEN, ORANGE, RED, build_figure, parse_output, print_table, save_figure
from examples.theory.tabular import compute_tabular_losses, compute_total_variation, mark_first, minimize

REWARDS = torch.tensor([1.2, 1.0, 0.4, 0.0, -0.5, -1.1], dtype=torch.float64)
NUM_RESPONSES = 6
ALPHAS = (0.25, 0.5, 1.0, 2.0)
NUM_STARTS = 20
NUM_STEPS = 120
FORMS = ("pairs", "best_of_n", "ranked")


@dataclass(frozen=True, kw_only=True)
class Population:
    """Labelled groups [G, K], the preferred (or the whole order) first, and their probabilities [G]."""

    groups: Tensor
    probabilities: Tensor


@dataclass(frozen=True, kw_only=True)
class Minimizers:
    """The plot's numbers."""

    learned: dict[float, Tensor]
    """α → policies [R, V] that L-BFGS found from R random starts."""
    distances: dict[float, Tensor]
    """α → total variation [steps, R] to softmax(r / α) along gradient descent."""
    forms: dict[str, float]
    """Form → the largest distance over the starts, α = 0.5, triples."""
    weighted: float
    """The same for pairs with the weight μ, γ = 1."""
    deterministic: dict[float, Tensor]
    """α → entropy [steps] in nats of the policy where the higher reward always wins."""
    greedy: dict[str, Tensor]
    """Pair frequencies → policy [V] after gradient descent at α = 0."""
    net_wins: dict[str, Tensor]
    """Pair frequencies → c [V]."""


def compute_optimum(alpha: float) -> Tensor:
    """softmax(r / α) [V]."""
    return torch.softmax(REWARDS / alpha, dim=-1)


def draw_pair_frequencies() -> Tensor:
    """[V, V] symmetric, positive, summing to 1 off the diagonal: how often each pair is compared."""
    generator = torch.Generator().manual_seed(3)
    raw = torch.exp(3.0 * torch.rand(NUM_RESPONSES, NUM_RESPONSES, dtype=torch.float64, generator=generator))
    return normalize_frequencies(raw)


def normalize_frequencies(raw: Tensor) -> Tensor:
    """Symmetric, zero on the diagonal, summing to 1."""
    symmetric = (raw + raw.T).fill_diagonal_(0.0)
    return symmetric / symmetric.sum()


def build_pairs(frequencies: Tensor, *, deterministic: bool = False) -> Population:
    """All ordered pairs, labelled by a Bradley–Terry judge, or by the higher reward always."""
    groups = torch.tensor(list(itertools.permutations(range(NUM_RESPONSES), 2)))
    winner, loser = groups.unbind(dim=-1)
    gap = REWARDS[winner] - REWARDS[loser]
    wins = (gap > 0).double() if deterministic else torch.sigmoid(gap)
    # A pair appears in both orders, so its frequency is counted twice and halved by the judge's two outcomes.
    return Population(groups=groups, probabilities=2 * frequencies[winner, loser] * wins)


def build_triples(form: str) -> Population:
    """All ordered triples with the probability that a Plackett–Luce judge orders them so; for best_of_n, only the
    first place is read, and the two orders of the others add up."""
    groups = torch.tensor(list(itertools.permutations(range(NUM_RESPONSES), 3)))
    weights = REWARDS.exp()[groups]
    first = weights[:, 0] / weights.sum(dim=-1)
    second = weights[:, 1] / weights[:, 1:].sum(dim=-1)
    num_subsets = groups.shape[0] / 6
    return Population(groups=groups, probabilities=first * (0.5 if form == "best_of_n" else second) / num_subsets)


def compute_objective(logits: Tensor, population: Population, alpha: float, form: str = "pairs", gamma: float = 0.0) -> Tensor:
    """Population loss [...] of softmax policies with logits [..., V]."""
    place = torch.arange(population.groups.shape[-1], dtype=torch.float64)
    rewards = -place.expand(population.groups.shape) if form == "ranked" else mark_first(population.groups)
    losses = compute_tabular_losses(
        "spo",
        torch.log_softmax(logits, dim=-1),
        population.groups,
        rewards=rewards,
        form=form,
        alpha=alpha,
        gamma=gamma,
    )
    return (population.probabilities * losses).sum(dim=-1)


def draw_starts() -> Tensor:
    """[R, V] logits far from uniform."""
    generator = torch.Generator().manual_seed(5)
    return 2.0 * torch.randn(NUM_STARTS, NUM_RESPONSES, dtype=torch.float64, generator=generator)


def descend(
    population: Population, alpha: float, start: Tensor, *, step: float, num_steps: int, gamma: float = 0.0
) -> list[Tensor]:
    """Policies along gradient descent on the logits; for γ > 0 the gradient stops at the weight μ (Eq. 14)."""
    logits, policies = start.clone(), []
    for _ in range(num_steps):
        leaf = logits.requires_grad_(True)
        (gradient,) = torch.autograd.grad(compute_objective(leaf, population, alpha, gamma=gamma).sum(), leaf)
        logits = (leaf - step * gradient).detach()
        policies.append(torch.softmax(logits, dim=-1))
    return policies


def find_minimizers(population: Population, alpha: float, form: str = "pairs") -> Tensor:
    """Policies [R, V] that L-BFGS finds from the random starts."""
    logits = minimize(lambda values: compute_objective(values, population, alpha, form).sum(), draw_starts())
    return torch.softmax(logits, dim=-1)


def compute_net_wins(population: Population) -> Tensor:
    """c [V]: probability that a comparison is won by y, minus that it is lost by y."""
    wins = torch.zeros(NUM_RESPONSES, dtype=torch.float64)
    wins.index_add_(0, population.groups[:, 0], population.probabilities)
    return wins.index_add_(0, population.groups[:, 1], -population.probabilities)


def compute_minimizers() -> Minimizers:
    """All numbers."""
    pairs = build_pairs(draw_pair_frequencies())
    uniform = normalize_frequencies(torch.ones(NUM_RESPONSES, NUM_RESPONSES, dtype=torch.float64))
    skewed = torch.ones(NUM_RESPONSES, NUM_RESPONSES, dtype=torch.float64)
    skewed[0, 1], skewed[1, 2:] = 10.0, 5.0  # the best meets mostly the second best, which meets mostly bad ones
    frequencies = {"uniform": uniform, "skewed": normalize_frequencies(skewed)}
    zero = torch.zeros(NUM_RESPONSES, dtype=torch.float64)
    distances, deterministic = {}, {}
    for alpha in ALPHAS:
        # The curvature of a pair's loss is at most α / 4, so a step of 8 / α is stable for any pair frequencies.
        path = torch.stack(descend(pairs, alpha, draw_starts(), step=8 / alpha, num_steps=NUM_STEPS))
        distances[alpha] = compute_total_variation(path, compute_optimum(alpha))
        path = torch.stack(descend(build_pairs(uniform, deterministic=True), alpha, zero, step=8, num_steps=NUM_STEPS))
        deterministic[alpha] = -torch.special.xlogy(path, path).sum(dim=-1)
    forms = {}
    for form in FORMS[1:]:
        found = find_minimizers(build_triples(form), 0.5, form)
        forms[form] = float(compute_total_variation(found, compute_optimum(0.5)).max())
    weighted = torch.stack(
        [descend(pairs, 0.5, start, step=16, num_steps=NUM_STEPS, gamma=1.0)[-1] for start in draw_starts()[:3]]
    )
    return Minimizers(
        learned={alpha: find_minimizers(pairs, alpha) for alpha in ALPHAS},
        distances=distances,
        forms=forms,
        weighted=float(compute_total_variation(weighted, compute_optimum(0.5)).max()),
        deterministic=deterministic,
        greedy={
            name: descend(build_pairs(values), 0.0, zero, step=200, num_steps=50)[-1] for name, values in frequencies.items()
        },
        net_wins={name: compute_net_wins(build_pairs(values)) for name, values in frequencies.items()},
    )


def report(result: Minimizers) -> None:
    """Print the numbers."""
    rows = []
    for alpha, learned in result.learned.items():
        optimum = compute_optimum(alpha)
        shown = [f"{float(learned[0, y]):.4f}/{float(optimum[y]):.4f}" for y in (0, 1, 5)]
        largest = float(compute_total_variation(learned, optimum).max())
        rows.append([f"{alpha:g}", *shown, f"{largest:.1e}", f"{float(result.distances[alpha][-1].max()):.1e}"])
    headers = ["alpha", "best", "second", "worst", "max TV, L-BFGS", "max TV, descent"]
    print_table(f"SPO Theorem 1: learned / softmax(r / alpha), {NUM_STARTS} starts", headers, rows)
    rows = [[f"form = {form}", f"{distance:.1e}"] for form, distance in result.forms.items()]
    rows.append(["pairs, gamma = 1", f"{result.weighted:.1e}"])
    print_table("Theorems 2-4, alpha = 0.5: max TV to softmax(r / alpha)", ["loss", "max TV"], rows)
    rows = [[f"{alpha:g}", f"{float(entropy[-1]):.3f}"] for alpha, entropy in result.deterministic.items()]
    print_table(f"Higher reward always wins: entropy after {NUM_STEPS} steps (falls on)", ["alpha", "nats"], rows)
    rows = [
        [name, " ".join(f"{c:+.3f}" for c in result.net_wins[name].tolist()), " ".join(f"{p:.2f}" for p in policy.tolist())]
        for name, policy in result.greedy.items()
    ]
    print_table("alpha = 0: policy after descent", ["pair frequencies", "net wins", "policy (best first)"], rows)


def plot(result: Minimizers, output: Path) -> Path:
    """Policies; convergence; failures."""
    figure, (left, middle, right) = build_figure(3)
    colors = dict(zip(ALPHAS, (RED, ORANGE, GREEN, BLUE), strict=True))
    for alpha, learned in result.learned.items():
        left.plot(REWARDS, compute_optimum(alpha), "--", color=colors[alpha], linewidth=1)
        left.plot(REWARDS, learned.mean(dim=0), "o", color=colors[alpha], markersize=5, label=f"learned, α = {alpha:g}")
        middle.plot(result.distances[alpha].clamp(min=1e-17), color=colors[alpha], alpha=0.3, linewidth=0.8)
        middle.plot([], [], color=colors[alpha], label=f"α = {alpha:g}")
        right.plot(result.deterministic[alpha], color=colors[alpha], label=f"higher reward always wins, α = {alpha:g}")
        entropy = -torch.special.xlogy(compute_optimum(alpha), compute_optimum(alpha)).sum()
        right.axhline(float(entropy), linestyle=":", color=colors[alpha], linewidth=1)
    left.plot([], [], "--", color="black", linewidth=1, label="softmax(r/α)")
    left.set(yscale="log", xlabel="reward r", ylabel="π(y)")
    left.legend(fontsize=8)
    middle.set(yscale="log", xlabel="gradient step", ylabel="TV to softmax(r/α)")
    middle.set_title(f"{NUM_STARTS} random starts each", fontsize=10)
    middle.legend(fontsize=8)
    right.set(xlabel="gradient step", ylabel="entropy of the policy (nats)", xscale="log")
    right.set_title("without Bradley–Terry data; dotted: softmax(r/α)", fontsize=10)
    right.legend(fontsize=7)
    return save_figure(figure, output, "spo_minimizer")


def run(output: Path) -> Path:
    """Compute, print, draw."""
    result = compute_minimizers()
    report(result)
    return plot(result, output)


if __name__ == "__main__":
    run(parse_output(__doc__))

"""MPO, Theorem 1 (Theorem 3 in App. E) and SWEPO, Theorem 1: with n preferred responses the error falls as 1/√n.

Claims. MPO: for a well-specified exponential family of fixed dimension, the policy fitted to n independent
preferred responses has expected total variation Õ(1/√n) from the true preference distribution; by Remark 3 the
same holds for n choices drawn from a Plackett–Luce model. SWEPO: with k responses the expected bias of an
attribute's mean is at most σ/√k.

Set-up. V = 8 responses, p ∝ exp(θᵀφ(y)) with d = 3 features, true θ known, π_ref uniform. Per n, fresh data
in each of R replicates, and the policy minimises the package's own loss:
- `sft` on n draws from p: the learner of assumption A5 (maximum likelihood);
- `mpo` with β = 1 and labels, on n groups of 4 in which a Plackett–Luce judge chose one: Remark 3;
- `mpo` with β = 1 on one group of n draws from p (chosen) and n from π_ref (rejected): the contrast.

Shown. Left: mean total variation with 95 % intervals, fitted slopes, and the asymptotic law
E TV = Σ_y p(y) √((φ − φ̄)ᵀ I⁻¹ (φ − φ̄) / (2πn)), I the Fisher information per observation, which has no free
constant. Right: the attribute's bias |E_π a − E_p a| for a = φ_1, the bound σ/√n and the exact σ √(2/(πn)).

What the papers have loose, and what holds:
- MPO says "the policy trained on n preferred samples"; the proof's learner is maximum likelihood (A5), not the
  minimiser of MPO's set loss (Eq. 5). With n chosen and n rejected in one group that loss has no finite
  minimiser (it concentrates on the responses with the largest p/π_ref), and its error does not fall: the third
  curve. Where MPO's loss is a likelihood (one chosen per group, β = 1), the rate is there.
- SWEPO identifies the trained policy's attribute mean with the mean over the k positives. That is true of
  maximum likelihood when the attribute is among the features (moment matching) or the model is tabular; no
  property of the SWEPO loss enters. Its bound is per query: averaging over Q independent queries reduces the
  bias by √Q more.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from examples.theory.report import BLUE, GREEN, GREY, RED, build_figure, parse_output, print_table, save_figure
from examples.theory.tabular import (
    PowerLaw,
    compute_mean_and_error,
    compute_tabular_losses,
    compute_total_variation,
    fit_power_law,
    list_subsets,
    mark_first,
    minimize,
)

NUM_RESPONSES, NUM_FEATURES, GROUP_SIZE = 8, 3, 4
SAMPLE_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
SET_LOSS_ITERATIONS = 30


@dataclass(frozen=True, kw_only=True)
class Family:
    """The exponential family: features [V, d] and the true distribution."""

    features: Tensor
    true_parameters: Tensor

    def compute_logps(self, parameters: Tensor) -> Tensor:
        """log p_θ(y) [..., V] of parameters [..., d]."""
        return torch.log_softmax(parameters @ self.features.T, dim=-1)

    @property
    def true_probabilities(self) -> Tensor:
        """p(y) [V]."""
        return self.compute_logps(self.true_parameters).exp()


@dataclass(frozen=True, kw_only=True)
class Errors:
    """Errors of one learner over sample sizes n: means over the replicates and their standard errors, each [N]."""

    total_variation: Tensor
    total_variation_error: Tensor
    bias: Tensor
    bias_error: Tensor

    def fit(self) -> PowerLaw:
        """Power law of the total variation in n."""
        return fit_power_law(torch.tensor(SAMPLE_SIZES), self.total_variation, self.total_variation_error)

    def fit_bias(self) -> PowerLaw:
        """Power law of the attribute's bias in n."""
        return fit_power_law(torch.tensor(SAMPLE_SIZES), self.bias, self.bias_error)


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """The plot's numbers; laws hold at n = 1, and scale as 1/√n."""

    likelihood: Errors
    choices: Errors
    set_loss: Errors
    likelihood_law: float
    choices_law: float
    attribute_deviation: float
    """σ of the attribute under the true distribution."""


def build_family() -> Family:
    """Fixed features in [−1, 1] and parameters of a moderately peaked distribution."""
    generator = torch.Generator().manual_seed(7)
    features = 2 * torch.rand(NUM_RESPONSES, NUM_FEATURES, dtype=torch.float64, generator=generator) - 1
    return Family(features=features, true_parameters=torch.tensor([1.0, -0.7, 0.5], dtype=torch.float64))


def draw_frequencies(probabilities: Tensor, num_draws: int, num_replicates: int, generator: torch.Generator) -> Tensor:
    """[R, C] share of each category among n independent draws."""
    draws = torch.multinomial(probabilities.expand(num_replicates, -1), num_draws, replacement=True, generator=generator)
    counts = torch.zeros(num_replicates, probabilities.shape[-1], dtype=torch.float64)
    return counts.scatter_add_(-1, draws, torch.ones(draws.shape, dtype=torch.float64)) / num_draws


def fit_likelihood(family: Family, num_draws: int, num_replicates: int, generator: torch.Generator) -> Tensor:
    """θ̂ [R, d] from n draws per replicate with the loss `sft`; draws of one response share one group."""
    frequencies = draw_frequencies(family.true_probabilities, num_draws, num_replicates, generator)
    groups = torch.arange(NUM_RESPONSES).unsqueeze(-1)  # [V, 1]

    def objective(parameters: Tensor) -> Tensor:
        logps = family.compute_logps(parameters)
        return (frequencies * compute_tabular_losses("sft", logps, groups, normalization="sequence")).sum()

    return minimize(objective, torch.zeros(num_replicates, NUM_FEATURES, dtype=torch.float64))


def list_choice_groups(family: Family) -> tuple[Tensor, Tensor]:
    """All (subset of 4, which one was chosen) as groups [G, 4] with the chosen first, and their probabilities
    [G]: a uniform subset, and a Plackett–Luce choice from it."""
    subsets = list_subsets(NUM_RESPONSES, GROUP_SIZE)
    rotations = [subsets.roll(-place, dims=-1) for place in range(GROUP_SIZE)]
    groups = torch.cat(rotations)
    chosen = family.true_probabilities[groups]
    return groups, chosen[:, 0] / chosen.sum(dim=-1) / subsets.shape[0]


def fit_choices(family: Family, num_draws: int, num_replicates: int, generator: torch.Generator) -> Tensor:
    """θ̂ [R, d] from n Plackett–Luce choices per replicate with the loss `mpo`."""
    groups, probabilities = list_choice_groups(family)
    frequencies = draw_frequencies(probabilities, num_draws, num_replicates, generator)
    uniform = torch.full((NUM_RESPONSES,), -math.log(NUM_RESPONSES), dtype=torch.float64)
    labels = mark_first(groups).to(torch.int8)

    def objective(parameters: Tensor) -> Tensor:
        logps = family.compute_logps(parameters)
        losses = compute_tabular_losses(
            "mpo", logps, groups, reference_logps=uniform, labels=labels, partition="labels", beta=1.0
        )
        return (frequencies * losses).sum()

    return minimize(objective, torch.zeros(num_replicates, NUM_FEATURES, dtype=torch.float64))


def fit_set_loss(family: Family, num_draws: int, num_replicates: int, generator: torch.Generator) -> Tensor:
    """θ [R, d] after a fixed number of steps on `mpo` with n draws from p as chosen and n from π_ref as rejected."""
    uniform = torch.full((NUM_RESPONSES,), 1 / NUM_RESPONSES, dtype=torch.float64)
    shape = (num_replicates, -1)
    chosen = torch.multinomial(family.true_probabilities.expand(shape), num_draws, True, generator=generator)
    rejected = torch.multinomial(uniform.expand(shape), num_draws, True, generator=generator)
    groups = torch.cat([chosen, rejected], dim=-1).unsqueeze(-2)  # [R, 1, 2n]
    labels = (torch.arange(2 * num_draws) < num_draws).to(torch.int8).expand(groups.shape)

    def objective(parameters: Tensor) -> Tensor:
        logps = family.compute_logps(parameters)
        return compute_tabular_losses(
            "mpo", logps, groups, reference_logps=uniform.log(), labels=labels, partition="labels", beta=1.0
        ).sum()

    start = torch.zeros(num_replicates, NUM_FEATURES, dtype=torch.float64)
    return minimize(objective, start, max_iterations=SET_LOSS_ITERATIONS)


def summarize(family: Family, fits: list[Tensor]) -> Errors:
    """Errors of fitted parameters, one [R, d] per sample size."""
    truth = family.true_probabilities
    policies = [family.compute_logps(parameters).exp() for parameters in fits]
    distances = [compute_mean_and_error(compute_total_variation(policy, truth)) for policy in policies]
    biases = [compute_mean_and_error(((policy - truth) @ family.features[:, 0]).abs()) for policy in policies]
    return Errors(
        total_variation=torch.stack([mean for mean, _ in distances]),
        total_variation_error=torch.stack([error for _, error in distances]),
        bias=torch.stack([mean for mean, _ in biases]),
        bias_error=torch.stack([error for _, error in biases]),
    )


def compute_covariance(features: Tensor, probabilities: Tensor) -> Tensor:
    """Covariance [..., d, d] of features [..., V, d] under probabilities [..., V]."""
    centred = features - (probabilities.unsqueeze(-1) * features).sum(dim=-2, keepdim=True)
    return (probabilities[..., None, None] * centred.unsqueeze(-1) * centred.unsqueeze(-2)).sum(dim=-3)


def compute_asymptotic_law(family: Family, information: Tensor) -> float:
    """lim √n E TV for θ̂ − θ ~ N(0, I⁻¹ / n): ½ Σ p(y) E|(φ(y) − φ̄)ᵀ(θ̂ − θ)|, and E|N(0, v)| = √(2v/π)."""
    probabilities = family.true_probabilities
    centred = family.features - probabilities @ family.features
    variance = (centred @ torch.linalg.inv(information) * centred).sum(dim=-1)
    return float(0.5 * (probabilities * (2 * variance / math.pi).sqrt()).sum())


def compute_convergence(num_replicates: int = 400, num_set_replicates: int = 40) -> Convergence:
    """All curves. Seeds differ per learner and n, so that the points are independent."""
    family = build_family()

    def generate(learner: int, size: int) -> torch.Generator:
        return torch.Generator().manual_seed(10_000 * learner + size)

    groups, _ = list_choice_groups(family)
    subsets = groups[: groups.shape[0] // GROUP_SIZE]
    within = family.true_probabilities[subsets]
    per_subset = compute_covariance(family.features[subsets], within / within.sum(dim=-1, keepdim=True))
    per_draw = compute_covariance(family.features, family.true_probabilities)
    return Convergence(
        likelihood=summarize(family, [fit_likelihood(family, n, num_replicates, generate(1, n)) for n in SAMPLE_SIZES]),
        choices=summarize(family, [fit_choices(family, n, num_replicates, generate(2, n)) for n in SAMPLE_SIZES]),
        set_loss=summarize(family, [fit_set_loss(family, n, num_set_replicates, generate(3, n)) for n in SAMPLE_SIZES]),
        likelihood_law=compute_asymptotic_law(family, per_draw),
        choices_law=compute_asymptotic_law(family, per_subset.mean(dim=0)),
        attribute_deviation=float(per_draw[0, 0].sqrt()),
    )


def report(result: Convergence) -> None:
    """Print the numbers."""
    rows = []
    for index, n in enumerate(SAMPLE_SIZES):
        cells = [str(n)]
        for errors in (result.likelihood, result.choices, result.set_loss):
            cells.append(f"{errors.total_variation[index]:.4f} ± {errors.total_variation_error[index]:.4f}")
        cells.append(f"{result.likelihood.bias[index]:.4f} ± {result.likelihood.bias_error[index]:.4f}")
        rows.append([*cells, f"{result.attribute_deviation / math.sqrt(n):.4f}"])
    headers = ["n", "TV, sft", "TV, mpo on choices", "TV, mpo on sets", "bias, sft", "bound"]
    print_table("MPO Theorem 1, SWEPO Theorem 1: error with n samples (mean ± standard error)", headers, rows)
    fits = (
        ("TV, sft", result.likelihood.fit()),
        ("TV, mpo on choices", result.choices.fit()),
        ("bias, sft", result.likelihood.fit_bias()),
    )
    rows = [[name, f"{fit.slope:.3f}", "[{:.3f}, {:.3f}]".format(*fit.confidence_interval)] for name, fit in fits]
    print_table("Fitted exponents", ["error", "slope", "95 % interval"], rows)


def plot(result: Convergence, output: Path) -> Path:
    """Total variation and bias against n, log-log."""
    figure, (left, right) = build_figure(2)
    sizes = torch.tensor(SAMPLE_SIZES, dtype=torch.float64)
    for errors, law, color, label in (
        (result.likelihood, result.likelihood_law, BLUE, "sft on n samples"),
        (result.choices, result.choices_law, GREEN, "mpo on n choices"),
        (result.set_loss, None, RED, "mpo on n chosen, n rejected"),
    ):
        if law is not None:
            label = f"{label} (slope {errors.fit().slope:.3f})"
        left.errorbar(
            sizes, errors.total_variation, 1.96 * errors.total_variation_error, fmt="o", color=color, markersize=4, label=label
        )
        if law is not None:
            left.plot(sizes, law / sizes.sqrt(), color=color, linewidth=1)
    left.set(xscale="log", yscale="log", xlabel="n", ylabel="E TV(learned, true)")
    left.set_title("lines: asymptotic law, no fitted constant", fontsize=10)
    left.legend(fontsize=8)
    bias = result.likelihood
    label = f"sft on n samples (slope {bias.fit_bias().slope:.3f})"
    right.errorbar(sizes, bias.bias, 1.96 * bias.bias_error, fmt="o", color=BLUE, markersize=4, label=label)
    right.plot(sizes, result.attribute_deviation / sizes.sqrt(), color=GREY, label="σ/√n (SWEPO's bound)")
    exact = result.attribute_deviation * (2 / (math.pi * sizes)).sqrt()
    right.plot(sizes, exact, "--", color=BLUE, linewidth=1, label="σ √(2/(πn))")
    right.set(xscale="log", yscale="log", xlabel="n", ylabel="E |bias of the attribute|")
    right.set_title("attribute bias", fontsize=10)
    right.legend(fontsize=8)
    return save_figure(figure, output, "convergence_rate")


def run(output: Path) -> Path:
    """Compute, print, draw."""
    result = compute_convergence()
    report(result)
    return plot(result, output)


if __name__ == "__main__":
    run(parse_output(__doc__))

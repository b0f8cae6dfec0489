"""MC-PO, Proposition 3.3: ∇ log Ẑ is unbiased when y_0 comes from the model p_θ, and only then.

Claim. p_θ(y) = μ(y) e^{β r_θ(y)} / Z with r_θ = log(π_θ/π_ref), and Ẑ = (1/(M+1)) Σ_{i=0..M} e^{β r_θ(y_i)} with
y_1..y_M independent draws from the proposal μ. If y_0 ~ p_θ, then E ∇ log Ẑ = ∇ log Z for every M.

Set-up. V = 6 responses, a tabular softmax π_θ, μ = π_ref, β = 0.5. The gradient is that of the package's own
losses: L = −β s_0 + log Σ_i e^{β s_i} (Eq. 7) with y_0 marked as the preferred response, so that
∇ log Ẑ = ∇(L + β s_0). `rnce` takes all M draws as negatives; `mcpo` (kernel) chooses M of 8. Its mean over many
draws, coordinate by coordinate of the logits, is compared with the exact ∇ log Z.

Shown. Left: bias ± 95 % intervals for M = 3 and several sources of y_0. Right: the size of the bias against M, with
its exact value (an enumeration) for y_0 ~ μ and y_0 from the data's policy π*.
The table's χ² is the squared bias in units of its own Monte Carlo covariance: about V − 1 = 5 if there is none.

What the paper has loose, and what holds:
- p_θ is not the policy π_θ: they agree only for β = 1 and μ = π_ref. Sampling y_0 from π_θ, as "online" suggests,
  is biased for β ≠ 1, and taking the best of several samples, as OnMC-PO does, is too. The bias of any y_0 falls
  as 1/M.
- The proposition is about negatives drawn from μ (`rnce`). Negatives chosen by Algorithm 1's kernel follow
  neither μ nor, without y_0 among its categories, p_θ; with y_0 ~ p_θ, Eq. 7's gradient is then biased. What
  stays unbiased is contrastive divergence proper, β ∇r_θ(y_z) at the one response y_z the kernel returns, if y_0
  is kept among its categories (`include_current`) and y_0 ~ p_θ: then y_z ~ p_θ.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.theory.report import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    RED,
    build_figure,
    label_ticks,
    parse_output,
    print_table,
    save_figure,
)
from examples.theory.tabular import compute_mean_and_error, compute_tabular_losses, list_multisets, mark_first

NUM_RESPONSES = 6
BETA = 0.5
NUM_CANDIDATES = 8
"""L: draws from μ that the kernel chooses from."""
NUM_NEGATIVES = (1, 3, 8, 16)
REWARDS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 2.5], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.8, 0.5, 0.3, 0.0, -0.3, -0.6], dtype=torch.float64), dim=-1)
LOGITS = torch.tensor([-1.5, 1.0, 0.2, 2.0, -0.5, 1.8], dtype=torch.float64)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Monte Carlo mean of ∇ log Ẑ minus ∇ log Z, by coordinate [V]."""

    bias: Tensor
    standard_error: Tensor
    chi_squared: float
    """biasᵀ Cov⁻¹ bias; χ² with V − 1 degrees of freedom if there is no bias."""

    @property
    def size(self) -> float:
        """‖bias‖₂."""
        return float(self.bias.norm())


@dataclass(frozen=True, kw_only=True)
class NormalizerGradients:
    """The plot's numbers."""

    gradient: Tensor
    """∇ log Z [V]."""
    by_source: dict[str, dict[int, Estimate]]
    """Source of y_0 → M → estimate with `rnce`."""
    exact: dict[str, dict[int, Tensor]]
    """Source of y_0 → M → bias by enumeration [V]."""
    kernel: dict[str, Estimate]
    """Estimators with negatives from the kernel, y_0 ~ p_θ, M = 1."""


def compute_logps(logits: Tensor = LOGITS) -> Tensor:
    """log π_θ [V]."""
    return torch.log_softmax(logits, dim=-1)


def compute_model() -> Tensor:
    """p_θ [V]."""
    return torch.softmax(REFERENCE + BETA * (compute_logps() - REFERENCE), dim=-1)


def compute_exact_gradient() -> Tensor:
    """∇ log Z [V] with respect to the logits, by autograd through the full sum."""
    logits = LOGITS.clone().requires_grad_(True)
    log_normalizer = torch.logsumexp(REFERENCE + BETA * (compute_logps(logits) - REFERENCE), dim=-1)
    (gradient,) = torch.autograd.grad(log_normalizer, logits)
    return gradient


def list_sources() -> dict[str, Tensor]:
    """Distributions [V] that y_0 may come from."""
    policy = compute_logps().exp()
    # Best of 4 samples of the policy: Pr(max ≤ y) = F(y)^4, as rewards increase with the index.
    cumulative = policy.cumsum(dim=0)
    best = torch.cat([cumulative[:1] ** 4, (cumulative**4).diff()])
    return {
        "model p_θ": compute_model(),
        "policy π_θ": policy,
        "best of 4 from π_θ": best,
        "data π*": torch.softmax(REFERENCE + REWARDS, dim=-1),
        "proposal μ": REFERENCE.exp(),
    }


def draw(probabilities: Tensor, shape: tuple[int, int], generator: torch.Generator) -> Tensor:
    """Independent draws [R, n]."""
    draws = torch.multinomial(probabilities, shape[0] * shape[1], replacement=True, generator=generator)
    return draws.reshape(shape)


def compute_response_gradients(name: str, groups: Tensor, seed: int = 0, **hyperparameters: Any) -> Tensor:
    """∂L/∂log π_θ(y_i) [R, K] of each draw's loss, y_0 first and preferred."""
    logps = compute_logps()[groups].requires_grad_(True)
    index = torch.arange(groups.numel()).reshape(groups.shape)  # one table entry per response of every group
    losses = compute_tabular_losses(
        name,
        logps.reshape(-1),
        index,
        reference_logps=REFERENCE[groups].reshape(-1),
        rewards=mark_first(groups),
        beta=BETA,
        generator=torch.Generator().manual_seed(seed),
        **hyperparameters,
    )
    (gradients,) = torch.autograd.grad(losses.sum(), logps)
    return gradients


def pull_back(groups: Tensor, gradients: Tensor) -> Tensor:
    """Gradient with respect to the logits [R, V] from that with respect to the log-probabilities [R, K]."""
    by_response = torch.zeros(groups.shape[0], NUM_RESPONSES, dtype=torch.float64).scatter_add_(-1, groups, gradients)
    return by_response - gradients.sum(dim=-1, keepdim=True) * compute_logps().exp()


def compute_normalizer_gradients(groups: Tensor, loss_gradients: Tensor) -> Tensor:
    """∇ log Ẑ [R, V] = ∇(L + β s_0)."""
    gradients = loss_gradients.clone()
    gradients[:, 0] += BETA
    return pull_back(groups, gradients)


def summarize(samples: Tensor) -> Estimate:
    """Bias of samples [R, V] of ∇ log Ẑ. They lie in the plane Σ = 0, hence the pseudo-inverse."""
    mean, error = compute_mean_and_error(samples)
    bias = mean - compute_exact_gradient()
    covariance = torch.cov(samples.T) / samples.shape[0]
    chi_squared = bias @ torch.linalg.pinv(covariance, rtol=1e-9, hermitian=True) @ bias
    return Estimate(bias=bias, standard_error=error, chi_squared=float(chi_squared))


def estimate_source(probabilities: Tensor, num_negatives: int, num_draws: int, seed: int) -> Estimate:
    """∇ log Ẑ with y_0 from `probabilities` and M draws from μ, through `rnce`."""
    generator = torch.Generator().manual_seed(seed)
    preferred = draw(probabilities, (num_draws, 1), generator)
    groups = torch.cat([preferred, draw(REFERENCE.exp(), (num_draws, num_negatives), generator)], dim=-1)
    return summarize(
        compute_normalizer_gradients(groups, compute_response_gradients("rnce", groups, num_negatives=num_negatives))
    )


def enumerate_bias(probabilities: Tensor, num_negatives: int) -> Tensor:
    """The bias [V] by summing over all y_0 and all multisets of negatives; no loss is called."""
    others, log_orders = list_multisets(NUM_RESPONSES, num_negatives)
    weights = (log_orders + REFERENCE[others].sum(dim=-1)).exp()
    scaled = BETA * (compute_logps() - REFERENCE)
    mean = torch.zeros(NUM_RESPONSES, dtype=torch.float64)
    for response in range(NUM_RESPONSES):
        groups = torch.cat([torch.full((others.shape[0], 1), response), others], dim=-1)
        gradients = pull_back(groups, BETA * torch.softmax(scaled[groups], dim=-1))
        mean += probabilities[response] * (weights @ gradients)
    return mean - compute_exact_gradient()


def estimate_kernel(num_draws: int, *, include_current: bool) -> dict[str, Estimate]:
    """Estimators with the negative chosen by `mcpo`'s kernel among L draws from μ, y_0 ~ p_θ, M = 1."""
    generator = torch.Generator().manual_seed(99)
    preferred = draw(compute_model(), (num_draws, 1), generator)
    groups = torch.cat([preferred, draw(REFERENCE.exp(), (num_draws, NUM_CANDIDATES), generator)], dim=-1)
    gradients = compute_response_gradients("mcpo", groups, seed=98, include_current=include_current)
    name = "with y_0" if include_current else "without y_0"
    estimates = {f"Eq. 7, kernel {name}": summarize(compute_normalizer_gradients(groups, gradients))}
    # The chosen response is the one with a gradient; none has one if the kernel returned y_0 itself.
    chosen = (gradients[:, 1:] != 0).double()
    returned = torch.cat([1.0 - chosen.sum(dim=-1, keepdim=True), chosen], dim=-1)
    estimates[f"β ∇r(y_z), kernel {name}"] = summarize(pull_back(groups, BETA * returned))
    return estimates


def compute_gradients(num_draws: int = 100_000) -> NormalizerGradients:
    """All estimates; a seed of its own for each."""
    sources = list_sources()
    return NormalizerGradients(
        gradient=compute_exact_gradient(),
        by_source={
            name: {size: estimate_source(values, size, num_draws, 100 * place + size) for size in NUM_NEGATIVES}
            for place, (name, values) in enumerate(sources.items())
        },
        exact={name: {size: enumerate_bias(values, size) for size in NUM_NEGATIVES} for name, values in sources.items()},
        kernel={
            **estimate_kernel(num_draws, include_current=False),
            **estimate_kernel(num_draws, include_current=True),
        },
    )


def report(result: NormalizerGradients) -> None:
    """Print the numbers."""
    rows = []
    for name, by_size in result.by_source.items():
        for size, estimate in by_size.items():
            values = (estimate.size, float(estimate.standard_error.norm()), float(result.exact[name][size].norm()))
            rows.append([name, str(size), *(f"{value:.5f}" for value in values), f"{estimate.chi_squared:.1f}"])
    headers = ["y_0 from", "M", "|bias|", "std. error", "exact |bias|", "chi^2 (5 d.o.f.)"]
    print_table(f"MC-PO Proposition 3.3: bias of the gradient of log Z (norm {result.gradient.norm():.3f})", headers, rows)
    rows = [
        [name, f"{e.size:.5f}", f"{float(e.standard_error.norm()):.5f}", f"{e.chi_squared:.1f}"]
        for name, e in result.kernel.items()
    ]
    print_table("One negative chosen by the kernel, y_0 from the model", ["estimator", "|bias|", "std. error", "chi^2"], rows)


def plot(result: NormalizerGradients, output: Path) -> Path:
    """Bias by coordinate, and against M."""
    figure, (left, right) = build_figure(2)
    response = torch.arange(NUM_RESPONSES)
    colors = dict(zip(result.by_source, (BLUE, GREEN, RED, ORANGE, GREY), strict=True))
    for place, (name, by_size) in enumerate(result.by_source.items()):
        estimate = by_size[3]
        shift = 0.13 * (place - 2)
        left.errorbar(
            response + shift,
            estimate.bias,
            1.96 * estimate.standard_error,
            fmt="o",
            markersize=3.5,
            color=colors[name],
            label=name,
        )
        sizes = list(by_size)
        right.errorbar(
            sizes,
            [by_size[size].size for size in sizes],
            [1.96 * float(by_size[size].standard_error.norm()) / math.sqrt(NUM_RESPONSES - 1) for size in sizes],
            fmt="o",
            markersize=4,
            color=colors[name],
            label=name,
        )
        if name != "model p_θ":
            exact = result.exact[name]
            right.plot(list(exact), [float(bias.norm()) for bias in exact.values()], color=colors[name], linewidth=1)
    left.axhline(0, color="black", linewidth=0.8)
    left.set(xlabel="logit of response", ylabel="E ∇ log Ẑ − ∇ log Z")
    left.set_title("M = 3; 95 % intervals are smaller than the dots", fontsize=10)
    left.legend(fontsize=7.5, title="y_0 from", title_fontsize=8)
    noise = [float(estimate.standard_error.norm()) for estimate in result.by_source["model p_θ"].values()]
    right.fill_between(NUM_NEGATIVES, 1e-5, noise, color=BLUE, alpha=0.12, linewidth=0, label="Monte Carlo noise")
    right.set(xscale="log", yscale="log", ylim=(1e-4, 0.5), xlabel="negatives M", ylabel="‖bias‖")
    right.set_title("lines: exact", fontsize=10)
    label_ticks(right.xaxis, NUM_NEGATIVES)
    right.legend(fontsize=7.5)
    return save_figure(figure, output, "normalizer_gradient")


def run(output: Path) -> Path:
    """Compute, print, draw."""
    result = compute_gradients()
    report(result)
    return plot(result, output)


if __name__ == "__main__":
    run(parse_output(__doc__))

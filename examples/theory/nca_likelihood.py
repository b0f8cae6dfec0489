"""NCA paper, §4.2 and Table 1: the chosen response's likelihood falls under InfoNCA (DPO), and not under NCA.

Claim. InfoNCA fixes only differences of r_θ = β log(π_θ/μ) within a group, so even the best response may lose
likelihood while the loss falls; NCA fixes absolute values, and its optimum has r_θ(best) ≥ 0 (Theorem 4.2:
r/α − log E_μ e^{r/α} at the largest r).

Set-up. 100 prompts with V = 200 responses each, μ uniform; quality q ~ N(0, 1) is the reward, and each prompt's
data are one group of K = 4 responses. α → 0 (the preference limit): α = 0.05. Logits are
z(y) = g q(y) + 0.1 h(y), with g and all h(y) trained by gradient descent on the package's own losses, β = 1. The
shared direction g is what a network has and a table has not: raising a good response raises better ones it was
never shown. The h make every policy reachable, as the theorems ask. Control: no g, only independent logits.

Shown. Mean log-ratio of the chosen response and of its group over training, with 95 % intervals over prompts, for
`infonca`, `nca` and `dpo`; left with the shared direction, right the control.

What the paper has loose, and what holds:
- The fall is possible under InfoNCA, not implied by it. It needs responses that share parameters with unseen
  ones: g grows past the chosen response's own quality, and the mass moves to responses of higher q. With
  independent logits the chosen response gains under both losses.
- At r_θ = 0 both losses pull in the same direction: NCA's gradient is exactly half of InfoNCA's. NCA differs once
  r_θ has moved, so that it promises r_θ(best) ≥ 0 at the optimum, not at every step on every prompt.
- The bound r_θ(best) ≥ 0 survives the practical loss (Eq. 11): its optimum on a single group is
  r_θ = log(K t_i), and the best's t_i is at least 1/K.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.theory.report import BLUE, GREEN, ORANGE, build_figure, parse_output, print_table, save_figure
from examples.theory.tabular import compute_mean_and_error
from mpo_megatron.losses import group_loss

NUM_PROMPTS, NUM_RESPONSES, GROUP_SIZE = 100, 200, 4
ALPHA, BETA = 0.05, 1.0
OWN_SCALE = 0.1
"""Weight of a response's own logit h, so that its learning rate is 1 % of the shared direction's."""
LEARNING_RATE = 0.4
NUM_STEPS = 800
RECORD_EVERY = 10
HYPERPARAMETERS: dict[str, dict[str, Any]] = {
    "infonca": {"alpha": ALPHA, "beta": BETA},
    "nca": {"alpha": ALPHA, "beta": BETA},
    "dpo": {"beta": BETA},
}


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """Qualities [P, V] and groups [P, K], the best response first."""

    quality: Tensor
    groups: Tensor

    @property
    def rewards(self) -> Tensor:
        """[P, K]."""
        return self.quality.gather(-1, self.groups)


@dataclass(frozen=True, kw_only=True)
class Run:
    """One loss: log-ratios s = log π_θ − log μ of the group's responses, [N, P, K], best first, every
    `RECORD_EVERY` steps."""

    log_ratios: Tensor

    @property
    def chosen(self) -> Tensor:
        """s of the best response [N, P]."""
        return self.log_ratios[..., 0]

    @property
    def final_margin(self) -> Tensor:
        """s(best) − mean s of the others at the end [P]."""
        last = self.log_ratios[-1]
        return last[:, 0] - last[:, 1:].mean(dim=-1)


def draw_prompts() -> Prompts:
    """Independent normal qualities; the first K responses are the group."""
    generator = torch.Generator().manual_seed(2)
    quality = torch.randn(NUM_PROMPTS, NUM_RESPONSES, dtype=torch.float64, generator=generator)
    order = quality[:, :GROUP_SIZE].argsort(dim=-1, descending=True)
    return Prompts(quality=quality, groups=order)


def train(name: str, prompts: Prompts, *, shared: bool) -> Run:
    """Gradient descent on one loss, every prompt with parameters of its own."""
    direction = torch.zeros(NUM_PROMPTS, 1, dtype=torch.float64, requires_grad=True)
    own = torch.zeros(NUM_PROMPTS, NUM_RESPONSES, dtype=torch.float64, requires_grad=True)
    parameters = [direction, own] if shared else [own]
    # The control's logits are its only parameters: the same learning rate as the shared direction has.
    own_scale = OWN_SCALE if shared else 1.0
    log_uniform = -math.log(NUM_RESPONSES)
    reference = torch.full(prompts.groups.shape, log_uniform, dtype=torch.float64)
    recorded = []
    for step in range(NUM_STEPS + 1):
        logps = torch.log_softmax(direction * prompts.quality + own_scale * own, dim=-1).gather(-1, prompts.groups)
        if step % RECORD_EVERY == 0:
            recorded.append(logps.detach() - log_uniform)
        losses = group_loss(name, logps, reference, prompts.rewards, **HYPERPARAMETERS[name])
        gradients = torch.autograd.grad(losses.sum(), parameters)
        with torch.no_grad():
            for values, gradient in zip(parameters, gradients, strict=True):
                values -= LEARNING_RATE * gradient
    return Run(log_ratios=torch.stack(recorded))


def compute_likelihoods() -> dict[str, dict[str, Run]]:
    """Model ("shared", "independent") → loss → run."""
    prompts = draw_prompts()
    return {
        model: {name: train(name, prompts, shared=model == "shared") for name in HYPERPARAMETERS}
        for model in ("shared", "independent")
    }


def report(runs: dict[str, dict[str, Run]]) -> None:
    """Print the numbers."""
    rows = []
    for model, by_loss in runs.items():
        for name, run_ in by_loss.items():
            mean, error = compute_mean_and_error(run_.chosen[-1])
            peak = run_.chosen.mean(dim=-1).max()
            fell = (run_.chosen[-1] < 0).double().mean()
            rows.append(
                [
                    model,
                    name,
                    f"{mean:+.3f} ± {error:.3f}",
                    f"{peak:+.3f}",
                    f"{fell:.0%}",
                    f"{run_.chosen.min():+.3f}",
                    f"{run_.final_margin.mean():.2f}",
                ]
            )
    headers = ["model", "loss", "s(chosen) at the end", "its highest mean", "prompts fallen", "lowest ever", "margin"]
    print_table("NCA §4.2: log-ratio of the chosen response (nats)", headers, rows)


def plot(runs: dict[str, dict[str, Run]], output: Path) -> Path:
    """Log-ratios over training."""
    figure, panels = build_figure(2)
    titles = {"shared": "responses share a direction", "independent": "control: independent logits"}
    for axes, (model, by_loss) in zip(panels, runs.items(), strict=True):
        for (name, run_), color in zip(by_loss.items(), (ORANGE, BLUE, GREEN), strict=True):
            steps = torch.arange(run_.chosen.shape[0]) * RECORD_EVERY
            means, errors = compute_mean_and_error(run_.chosen.T)
            axes.plot(steps, means, color=color, label=f"{name}: chosen")
            axes.fill_between(steps, means - 1.96 * errors, means + 1.96 * errors, color=color, alpha=0.2, linewidth=0)
            axes.plot(steps, run_.log_ratios.mean(dim=(1, 2)), ":", color=color, label=f"{name}: group's mean")
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set(xlabel="gradient step", ylabel="log π_θ(y) − log μ(y), nats")
        axes.set_title(titles[model], fontsize=10)
        axes.legend(fontsize=7.5)
    panels[1].set_ylim(bottom=-5.5)  # room for the legend
    return save_figure(figure, output, "nca_likelihood")


def run(output: Path) -> Path:
    """Compute, print, draw."""
    runs = compute_likelihoods()
    report(runs)
    return plot(runs, output)


if __name__ == "__main__":
    run(parse_output(__doc__))

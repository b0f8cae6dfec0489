"""MPO, Lemma 1 (Lemma 10 in App. H; SWEPO, Lemma 3): the negatives' probability vanishes under the set loss.

Claim. The set loss is stationary where P_θ(y) → 0 for every y in Y−.

Set-up. A tabular softmax policy over 6 responses, 3 in Y+, 2 in Y−, one outside the group; it starts away from
the reference. Gradient flow dz/dτ = −∂L/∂z on the logits with the package's own `mpo` loss, followed over
twelve decades of training time τ by steps proportional to τ.

Shown. Left: Y−'s total probability against τ for several β, with the predicted law. Right, β = 1: each
response's probability under `mpo`, and under `infonca` on the same group, whose target keeps the negatives
alive. Also printed: the gradient on the negatives equals β p_i of Lemma 6 of the paper, and goes to zero with it.

What the paper has loose, and what holds:
- No stationary point exists at finite logits: the gradient β p_i on a negative is positive everywhere. The
  lemma describes a limit, reached slowly: the log-ratio gap grows as log(τ)/β, so P(Y−) falls as τ^(−1/β)
  (the exponent is derived here, not in the paper).
- The zero is that of p_i, the negative's share e^{βs} within the group. As P ≤ 1 bounds every s from above and
  the response set is finite, it does imply P_θ(y_i) → 0.
- It needs a policy that can tell the responses apart. Where the only positive shares its logit with a negative
  (equal features), that negative lives on, with probability ½: the "tied" row. With another positive left, the
  tied two vanish together: a positive is given up.
- The loss asks nothing of the division among the positives, nor of responses outside the group, yet they do not
  stay as they were: the positive with the largest log-ratio gains most and takes all in the end, and the other
  positives and the outsider vanish too, more slowly than Y−.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.theory.report import BLUE, GREEN, GREY, ORANGE, RED, build_figure, parse_output, print_table, save_figure
from examples.theory.tabular import compute_tabular_losses

BETAS = (0.5, 1.0, 2.0)
GROUP = torch.tensor([[0, 1, 2, 3, 4]])
REWARDS = torch.tensor([[2.0, 1.8, 1.6, 0.2, 0.0]], dtype=torch.float64)
POSITIVES, NEGATIVES, OUTSIDE = [0, 1, 2], [3, 4], 5
START = torch.tensor([0.3, 0.0, -0.2, 0.4, 0.1, 0.6], dtype=torch.float64)
REFERENCE = torch.log_softmax(torch.tensor([0.0, 0.5, 0.2, -0.3, 0.4, 0.1], dtype=torch.float64), dim=-1)
RELATIVE_STEP = 0.04
"""Δτ / τ of the flow's steps: gradients fall as 1/τ, so a step moves the logits by about this much."""
LAST_TIME = 2e12
FIT_FROM = 1e7
"""The exponent is fitted on τ above this: before, the leading positive still takes over from the others."""


@dataclass(frozen=True, kw_only=True)
class Flow:
    """One training run, at times [N]."""

    times: Tensor
    log_probabilities: Tensor
    """[N, V]."""
    gradients: Tensor
    """[N, V] ∂L/∂z."""

    @property
    def log_negative(self) -> Tensor:
        """log P(Y−) [N]."""
        return self.log_probabilities[:, NEGATIVES].logsumexp(dim=-1)

    def fit_exponent(self) -> float:
        """d log P(Y−) / d log τ over the late times, by least squares."""
        late = self.times >= FIT_FROM
        x, y = self.times[late].log(), self.log_negative[late]
        x = x - x.mean()
        return float((x * y).sum() / (x * x).sum())


@dataclass(frozen=True, kw_only=True)
class Vanishing:
    """The plot's numbers."""

    set_loss: dict[float, Flow]
    """β → run of `mpo`."""
    infonca: Flow
    tied: Flow
    """`mpo`, β = 1, the best response alone in Y+, and the first of `NEGATIVES` tied to it."""


def follow_flow(
    name: str, *, last_time: float = LAST_TIME, largest_step: float = math.inf, tied: bool = False, **hyperparameters: Any
) -> Flow:
    """Gradient flow of one loss from `START`, sampled at every tenth step."""
    logits, time = START.clone(), 1.0
    source = torch.arange(START.shape[0])
    if tied:
        source[NEGATIVES[0]] = POSITIVES[0]
    times, log_probabilities, gradients = [], [], []
    step = 0
    while time < last_time:
        leaf = logits.clone().requires_grad_(True)
        logps = torch.log_softmax(leaf[source], dim=-1)
        loss = compute_tabular_losses(name, logps, GROUP, reference_logps=REFERENCE, rewards=REWARDS, **hyperparameters).sum()
        (gradient,) = torch.autograd.grad(loss, leaf)
        if step % 10 == 0:
            times.append(time)
            log_probabilities.append(logps.detach())
            gradients.append(gradient)
        time_step = min(RELATIVE_STEP * time, largest_step)
        logits = logits - time_step * gradient
        time, step = time + time_step, step + 1
    return Flow(
        times=torch.tensor(times, dtype=torch.float64),
        log_probabilities=torch.stack(log_probabilities),
        gradients=torch.stack(gradients),
    )


def compute_shares(log_probabilities: Tensor, beta: float) -> Tensor:
    """p_i [N, 5]: softmax of β s over the group, s the log-ratio to the reference."""
    return torch.softmax(beta * (log_probabilities - REFERENCE)[:, GROUP[0]], dim=-1)


def compute_vanishing() -> Vanishing:
    """All runs. InfoNCA approaches its optimum exponentially: it is there by τ = 300, and growing steps would be
    unstable."""
    return Vanishing(
        set_loss={beta: follow_flow("mpo", beta=beta) for beta in BETAS},
        infonca=follow_flow("infonca", last_time=300, largest_step=0.5, alpha=1.0, beta=1.0),
        tied=follow_flow("mpo", tied=True, beta=1.0, partition="one_vs_rest"),
    )


def report(result: Vanishing) -> None:
    """Print the numbers."""
    rows = []
    for beta, flow in result.set_loss.items():
        late = [int((flow.times >= time).nonzero()[0]) for time in (1e2, 1e6, 1e12)]
        probabilities = [f"{flow.log_negative[index].exp():.2e}" for index in late]
        rows.append([f"mpo, beta = {beta:g}", *probabilities, f"{flow.fit_exponent():.3f}", f"{-1 / beta:.3f}"])
    rows.append(["infonca, alpha = beta = 1", f"{result.infonca.log_negative[-1].exp():.3f} at the end", "", "", "", ""])
    rows.append(["mpo, beta = 1, tied", *(f"{p:.3f}" for p in list_tied_probabilities(result.tied)), "", ""])
    headers = ["loss", "P(Y-) at 1e2", "1e6", "1e12", "exponent", "-1 / beta"]
    print_table("MPO Lemma 1: probability of the negatives against training time", headers, rows)
    flow, beta = result.set_loss[1.0], 1.0
    identity = (
        (flow.gradients[:, NEGATIVES] / (beta * compute_shares(flow.log_probabilities, beta)[:, NEGATIVES]) - 1).abs().max()
    )
    print(
        f"  gradient on negatives / (beta p_i) = 1 to within {identity:.1e};"
        f" gradient at the end {flow.gradients[-1].abs().max():.1e}"
    )
    positives = ", ".join(f"{p:.3f}" for p in flow.log_probabilities[-1, POSITIVES].exp())
    print(f"  at the end: positives {positives}; outsider {flow.log_probabilities[-1, OUTSIDE].exp():.1e}")


def list_tied_probabilities(flow: Flow) -> list[float]:
    """P of the tied negative at τ = 10², 10⁶, 10¹²."""
    late = [int((flow.times >= time).nonzero()[0]) for time in (1e2, 1e6, 1e12)]
    return [float(flow.log_probabilities[index, NEGATIVES[0]].exp()) for index in late]


def plot(result: Vanishing, output: Path) -> Path:
    """P(Y−) for several β; every response at β = 1, with InfoNCA."""
    figure, (left, right) = build_figure(2)
    for (beta, flow), color in zip(result.set_loss.items(), (GREEN, BLUE, ORANGE), strict=True):
        probabilities = flow.log_negative.exp()
        left.plot(flow.times, probabilities, color=color, label=f"mpo, β = {beta:g}")
        anchor = int((flow.times >= FIT_FROM).nonzero()[0])
        law = probabilities[anchor] * (flow.times / flow.times[anchor]) ** (-1 / beta)
        left.plot(flow.times[anchor:], law[anchor:], "--", color="black", linewidth=1)
    tied = result.tied
    tied_label = "a negative tied to the only positive"
    left.plot(tied.times, tied.log_probabilities[:, NEGATIVES[0]].exp(), color=GREY, label=tied_label)
    left.plot([], [], "--", color="black", linewidth=1, label="τ^(−1/β)")
    left.set(xscale="log", yscale="log", ylim=(1e-20, 2), xlabel="training time τ", ylabel="P(Y−)")
    left.legend(fontsize=8)
    flow = result.set_loss[1.0]
    for response in range(START.shape[0]):
        color = BLUE if response in POSITIVES else RED if response in NEGATIVES else GREY
        right.plot(flow.times, flow.log_probabilities[:, response].exp(), color=color)
        right.plot(result.infonca.times, result.infonca.log_probabilities[:, response].exp(), ":", color=color)
    for color, label in ((BLUE, "Y+"), (RED, "Y−"), (GREY, "outside the group")):
        right.plot([], [], color=color, label=label)
    right.plot([], [], color="black", label="mpo, β = 1")
    right.plot([], [], ":", color="black", label="infonca (finite optimum)")
    right.set(xscale="log", yscale="log", xlim=(1, 1e6), ylim=(1e-7, 2), xlabel="training time τ", ylabel="P(response)")
    right.legend(fontsize=8)
    return save_figure(figure, output, "vanishing_negatives")


def run(output: Path) -> Path:
    """Compute, print, draw."""
    result = compute_vanishing()
    report(result)
    return plot(result, output)


if __name__ == "__main__":
    run(parse_output(__doc__))

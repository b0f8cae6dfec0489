"""Win rates, their length-controlled variant and bootstrap intervals, against hand counts and independent fits."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mpo_megatron.evaluate.statistics import (
    Comparison,
    Samples,
    bootstrap,
    bootstrap_mean,
    compare,
    compute_length_controlled_win_rate,
    compute_win_rate,
)


def samples(rewards: list[float], lengths: list[int] | None = None) -> Samples:
    return Samples(rewards=np.array(rewards), lengths=np.array(lengths or [10] * len(rewards), dtype=float))


def simulated(num_prompts: int, strength: float, length_effect: float, seed: int = 0, shift: float = 0.0) -> Comparison:
    """Pairs whose outcome follows the logistic model exactly."""
    rng = np.random.default_rng(seed)
    difference = rng.normal(shift, 100, num_prompts)
    logit = strength + length_effect * np.tanh(difference / difference.std())
    wins = rng.random(num_prompts) < 1 / (1 + np.exp(-logit))
    return Comparison(prompt=np.arange(num_prompts), preference=wins.astype(float), length_difference=difference)


def test_win_rate_counts_every_prompt_once_and_ties_half() -> None:
    ours = [samples([1.0, 3.0]), samples([2.0])]
    theirs = [samples([2.0, 2.0, 3.0]), samples([1.0])]
    comparison = compare(ours, theirs)
    # Prompt 0: 1 < 2, 1 < 2, 1 < 3; 3 > 2, 3 > 2, 3 = 3: 2.5 wins of 6. Prompt 1: 1 of 1.
    assert compute_win_rate(comparison, np.ones(2)) == pytest.approx((2.5 / 6 + 1) / 2)
    assert comparison.num_ties == 1
    swapped = compare(theirs, ours)
    assert compute_win_rate(swapped, np.ones(2)) == pytest.approx(1 - (2.5 / 6 + 1) / 2)


def test_length_controlled_fit_is_the_penalised_likelihood_s_optimum() -> None:
    rng = np.random.default_rng(1)
    comparison = Comparison(
        prompt=np.repeat(np.arange(40), 2),
        preference=rng.choice([0.0, 0.5, 1.0], 80),
        length_difference=rng.normal(30, 80, 80),
    )
    weight = rng.integers(0, 3, 40).astype(float)
    found = compute_length_controlled_win_rate(comparison, weight)
    # The same optimum by Newton steps of torch's own derivatives.
    feature = torch.from_numpy(np.tanh(comparison.length_difference / comparison.length_difference.std()))
    rows = torch.from_numpy(comparison.weight * weight[comparison.prompt])
    target = torch.from_numpy(comparison.preference)

    def objective(theta: torch.Tensor) -> torch.Tensor:
        logit = theta[0] + theta[1] * feature
        likelihood = target * torch.nn.functional.logsigmoid(logit) + (1 - target) * torch.nn.functional.logsigmoid(-logit)
        return -(rows * likelihood).sum() + theta[1] ** 2 / 2

    theta = torch.zeros(2, dtype=torch.float64)
    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(objective, theta)
        theta = theta - torch.linalg.solve(torch.autograd.functional.hessian(objective, theta), gradient)
    assert found == pytest.approx(float(torch.sigmoid(theta[0])), abs=1e-5)


def test_length_control_recovers_what_length_hid() -> None:
    # Equally good models, but one writes longer answers and length is rewarded: only the plain rate is misled.
    comparison = simulated(4000, strength=0.0, length_effect=2.0, shift=150)
    everything = np.ones(4000)
    assert compute_win_rate(comparison, everything) > 0.75
    # Three standard errors of a proportion near one half, doubled for the second parameter.
    assert compute_length_controlled_win_rate(comparison, everything) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("won", [0.0, 1.0])
def test_length_control_without_contrast_is_the_plain_rate(won: float) -> None:
    comparison = Comparison(prompt=np.arange(5), preference=np.full(5, won), length_difference=np.arange(5.0))
    assert compute_length_controlled_win_rate(comparison, np.ones(5)) == won
    same_length = Comparison(prompt=np.arange(4), preference=np.array([0.0, 1, 1, 0.5]), length_difference=np.zeros(4))
    assert compute_length_controlled_win_rate(same_length, np.ones(4)) == pytest.approx(0.625)


def test_bootstrap_interval_is_that_of_the_mean() -> None:
    values = np.random.default_rng(3).normal(5, 2, 400)
    estimate = bootstrap_mean(values, num_resamples=2000, seed=7)
    half = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    # 2000 resamples put a quantile of a normal within about 5 % of its distance from the mean.
    assert values.mean() - estimate.low == pytest.approx(half, rel=0.1)
    assert estimate.high - values.mean() == pytest.approx(half, rel=0.1)
    again = bootstrap(lambda w: float(w @ values / w.sum()), 400, num_resamples=2000, seed=7)
    assert again == estimate

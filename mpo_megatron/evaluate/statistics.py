"""Win rates between two sets of samples, plain and length-controlled, and bootstrap intervals over prompts.

Legend: P prompts, N pairs (one sample of the candidate, one of the baseline, for the same prompt).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpo_megatron.data.arrays import Float64, Int64

CONFIDENCE = 0.95
"""Share of bootstrap resamples inside an interval."""


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A number with its percentile-bootstrap interval; resamples draw prompts, which are independent."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Pairs of samples of the same prompts."""

    prompt: Int64
    """[N] index of each pair's prompt, 0 … P−1."""
    preference: Float64
    """[N] 1 if the candidate's sample has the higher reward, 0 if the lower, ½ for a tie."""
    length_difference: Float64
    """[N] characters of the candidate's sample minus those of the baseline's."""

    @property
    def num_prompts(self) -> int:
        """P: number of prompts."""
        return int(self.prompt.max()) + 1

    @property
    def weight(self) -> Float64:
        """[N] 1 / number of the prompt's pairs: every prompt has equal weight, however many samples it has."""
        return 1.0 / np.bincount(self.prompt)[self.prompt]

    @property
    def num_ties(self) -> int:
        """Pairs of equal reward."""
        return int((self.preference == 0.5).sum())


@dataclass(frozen=True, kw_only=True)
class Samples:
    """The samples of one prompt, one entry each."""

    rewards: Float64
    """[K]"""
    lengths: Float64
    """[K] in characters."""


def compare(candidate: list[Samples], baseline: list[Samples]) -> Comparison:
    """All pairs of a candidate's and a baseline's sample, prompt by prompt; both lists hold the same P prompts in order."""
    prompt, preference, difference = [], [], []
    for index, (ours, theirs) in enumerate(zip(candidate, baseline, strict=True)):
        order = np.sign(ours.rewards[:, None] - theirs.rewards[None, :]).ravel()
        preference.append((order + 1) / 2)
        difference.append((ours.lengths[:, None] - theirs.lengths[None, :]).ravel())
        prompt.append(np.full(len(order), index))
    return Comparison(
        prompt=np.concatenate(prompt),
        preference=np.concatenate(preference),
        length_difference=np.concatenate(difference),
    )


def compute_win_rate(comparison: Comparison, prompt_weight: Float64) -> float:
    """Share of pairs that the candidate wins, a tie counting half; prompts weighted by `prompt_weight` [P]."""
    weight = comparison.weight * prompt_weight[comparison.prompt]
    return float((weight * comparison.preference).sum() / weight.sum())


def compute_length_controlled_win_rate(comparison: Comparison, prompt_weight: Float64) -> float:
    """The win rate that a logistic model predicts for answers of equal length.

    logit P(win) = θ + φ · tanh(Δ / std(Δ)), Δ the difference of the lengths; the result is σ(θ). A tie is half a win and half a
    loss. θ and φ maximise the weighted likelihood minus φ²/2, which keeps φ finite if length alone separates wins from losses.
    Source: length-controlled AlpacaEval (Dubois et al. 2024), Eq. 2, without its instruction-difficulty term, which needs the
    answers of many models, and with this penalty instead of one chosen by cross-validation.
    """
    from sklearn.linear_model import LogisticRegression  # slow to import

    weight = comparison.weight * prompt_weight[comparison.prompt]
    win_rate = float((weight * comparison.preference).sum() / weight.sum())
    spread = comparison.length_difference.std()
    if win_rate in (0.0, 1.0) or spread == 0:  # the logistic model has no optimum, or lengths are equal
        return win_rate
    feature = np.tanh(comparison.length_difference / spread)[:, None]
    targets = np.repeat([1, 0], len(feature))
    weights = np.concatenate([weight * comparison.preference, weight * (1 - comparison.preference)])
    model = LogisticRegression(C=1.0, tol=1e-8).fit(np.concatenate([feature, feature]), targets, sample_weight=weights)
    return float(1 / (1 + np.exp(-model.intercept_[0])))


def bootstrap(statistic: Callable[[Float64], float], num_prompts: int, *, num_resamples: int, seed: int) -> Estimate:
    """A statistic of weighted prompts, and its interval over resamples of the prompts with replacement.

    Args:
        statistic: maps a weight per prompt [P] to a number
    """
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), size=num_resamples).astype(np.float64)
    values = np.array([statistic(weights) for weights in draws])
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return Estimate(value=statistic(np.ones(num_prompts)), low=float(low), high=float(high))


def bootstrap_mean(values: Float64, *, num_resamples: int, seed: int) -> Estimate:
    """Mean of one number per prompt [P], with its interval."""
    return bootstrap(lambda w: float(w @ values / w.sum()), len(values), num_resamples=num_resamples, seed=seed)

"""Suspicious steps, the reaction to them, and their records."""

from __future__ import annotations

import math
import random
from typing import Literal

import pytest

from mpo_megatron.config import FaultConfig
from mpo_megatron.train.faults.incidents import Guard

RECORDED = {
    "quickstart, MPO": (
        """
        0.776 0.892 0.677 0.82 0.722 0.684 0.724 0.838 0.65 0.712 0.658 0.525 0.624 0.514 0.533 0.51 0.444 0.318 0.422
        0.467 0.354 0.333 0.286 0.344 0.217 0.308 0.217 0.295 0.246 0.239 0.227 0.303 0.145 0.174 0.183 0.255 0.161
        0.232 0.21 0.206 0.212 0.35 0.307 0.245 0.157 0.228 0.121 0.172 0.192 0.17 0.198 0.228 0.213 0.263 0.159 0.197
        0.171 0.223 0.168 0.119
        """,
        """
        0.616 0.602 0.564 0.527 0.485 0.508 0.461 0.604 0.645 1.16 1.18 1.54 1.9 1.54 1.79 2.99 2.73 1.77 3.57 5.55
        2.75 3.59 4.57 4.78 1.32 3.76 9.85 14.5 7.02 2.82 1.77 2.7 2.02 2.15 9.25 2.51 1.28 3.16 1.43 1.43 1.41 0.495
        5.17 3.28 2.55 3.97 0.911 2.99 2.02 1.71 1.71 11.7 1.69 22.5 0.903 1.22 2.03 0.886 2.35 1.54
        """,
    ),
    "quickstart, DPO": (
        """
        0.693 0.692 0.697 0.696 0.686 0.671 0.679 0.705 0.669 0.636 0.653 0.659 0.641 0.618 0.564 0.562 0.522 0.515
        0.52 0.491 0.452 0.427 0.389 0.373 0.266 0.345 0.23 0.236 0.399 0.253 0.19 0.188 0.175 0.167 0.169 0.197 0.148
        0.136 0.157 0.148 0.0981 0.209 0.136 0.166 0.119 0.158 0.101 0.0639 0.12 0.124 0.152 0.0905 0.173 0.143 0.134
        0.13 0.0855 0.0923 0.113 0.165
        """,
        """
        1.06 0.988 0.971 1.02 0.963 1.01 0.902 0.882 0.754 1 0.808 0.924 1.1 1.11 0.925 1 1.12 1.5 1.34 1.38 1.71 2.11
        2.13 1.89 1.43 1.57 1.34 1.75 5.5 1.19 1.48 1.26 1.34 1.69 1.03 1.58 0.757 2.33 0.935 0.92 1.66 1.8 2.31 0.815
        1.58 1.79 0.59 1 0.43 2.32 1.76 0.438 2.39 1.91 0.943 0.377 0.948 0.436 0.34 0.636
        """,
    ),
    "quickstart's test": (
        """
        0.788 0.762 0.691 0.828 0.749 0.729 0.758 0.715 0.753 0.837 0.751 0.851 0.69 0.771 0.736 0.675 0.625 0.531
        0.541 0.581 0.454 0.45 0.635 0.48 0.588 0.445 0.512 0.36 0.403 0.272 0.413 0.328 0.307 0.331 0.256 0.35 0.345
        0.247 0.244 0.246
        """,
        """
        0.615 0.591 0.378 0.368 0.236 0.245 0.226 0.252 0.23 0.274 0.257 0.248 0.245 0.35 0.505 0.688 0.846 0.83 1.07
        1.26 1.71 1.37 2.05 2.11 2.68 2.15 4.71 3.66 3.07 2.33 2.65 3.49 1.54 2.72 1.52 1.9 2.41 1.46 1.38 2.4
        """,
    ),
    "on-policy example, learning rate too high": (
        """
        0.693 2.08 3.39 6.44 2.69 3.26 7.32 3.76 10.3 11.7 1.91 5.75 5.02 8.52 5.86 4.03 4.86 4.32
        """,
        """
        49 39.1 86.9 82.1 65.9 148 92.5 179 82.9 113 62.1 55 70.4 69.8 59.1 45.2 55 300
        """,
    ),
}
"""Losses and gradient norms, step by step, of normal runs of the examples."""


def recorded(name: str) -> list[tuple[float, float]]:
    losses, norms = (list(map(float, text.split())) for text in RECORDED[name])
    return list(zip(losses, norms, strict=True))


def trained(config: FaultConfig, steps: int = 40, seed: int = 0) -> Guard:
    """A guard after some ordinary steps: loss 0.6 ± 0.05, norm 2 ± 0.3."""
    rng, guard = random.Random(seed), Guard(config, [], [], 0)
    for _ in range(steps):
        assert guard.judge(rng.gauss(0.6, 0.05), rng.gauss(2, 0.3)).apply
    return guard


@pytest.mark.parametrize("loss, norm", [(math.nan, 1.0), (math.inf, 1.0), (0.5, math.nan), (0.5, math.inf), (-math.inf, 1.0)])
def test_what_is_not_finite_is_never_applied(loss: float, norm: float) -> None:
    stopped = Guard(FaultConfig(), [], [], 0).judge(loss, norm)
    assert (stopped.apply, stopped.stop) == (False, True)
    assert stopped.wrong is not None
    assert "not finite" in stopped.wrong
    guard = Guard(FaultConfig(on_nan="skip"), [], [], 0)
    skipped = guard.judge(loss, norm)
    assert (skipped.apply, skipped.stop, guard.skipped) == (False, False, 1)
    assert not guard.losses


def test_skips_in_a_row_are_limited_and_others_are_not() -> None:
    guard = Guard(FaultConfig(on_nan="skip", max_skips=2), [], [], 0)
    for _ in range(5):
        assert not guard.judge(math.nan, 1.0).stop
        assert not guard.judge(math.nan, 1.0).stop
        assert guard.judge(0.5, 1.0).apply
    assert guard.skipped == 10
    judgements = [guard.judge(math.nan, 1.0) for _ in range(3)]
    assert [judgement.stop for judgement in judgements] == [False, False, True]
    assert "max_skips" in (judgements[-1].wrong or "")


@pytest.mark.parametrize("policy, apply, stop", [("log", True, False), ("skip", False, False), ("stop", False, True)])
def test_spikes_of_loss_and_norm(policy: str, apply: bool, stop: bool) -> None:
    config = FaultConfig(on_spike=policy)  # type: ignore[arg-type]
    for loss, norm, name in ((3.0, 2.0, "loss 3"), (0.6, 40.0, "gradient norm 40")):
        judgement = trained(config).judge(loss, norm)
        assert (judgement.apply, judgement.stop) == (apply, stop)
        assert (judgement.wrong or "").startswith(name)


def test_ordinary_noise_falls_and_small_windows_are_no_spikes() -> None:
    for seed in range(20):
        guard = trained(FaultConfig(on_spike="stop"), seed=seed)
        assert guard.judge(-5.0, 0.001).wrong is None  # far below is no spike
    few = trained(FaultConfig(on_spike="stop", spike_window=32), steps=15)
    assert few.judge(100.0, 100.0).wrong is None
    equal = Guard(FaultConfig(on_spike="stop"), [0.5] * 40, [1.0] * 40, 0)
    assert equal.judge(0.51, 1.05).wrong is None  # no spread at all must not make everything a spike


@pytest.mark.parametrize("name", RECORDED)
def test_healthy_runs_have_no_spikes_and_planted_ones_are_found(name: str) -> None:
    """At every judged step, ten times the window's largest loss or norm is a spike, but the actual value is not."""
    config = FaultConfig(on_spike="skip")
    guard, planted = Guard(config, [], [], 0), 0
    for loss, norm in recorded(name):
        if 2 * len(guard.losses) >= config.spike_window:
            for spike, what in (((10 * max(guard.losses), norm), "loss"), ((loss, 10 * max(guard.norms)), "gradient norm")):
                judgement = Guard(config, guard.losses, guard.norms, 0).judge(*spike)
                assert not judgement.apply
                assert (judgement.wrong or "").startswith(what)
                planted += 1
        assert guard.judge(loss, norm).wrong is None
    assert planted == 2 * (len(recorded(name)) - config.spike_window // 2)


@pytest.mark.parametrize("policy", ["skip", "log"])
def test_a_run_may_find_another_level_at_once(policy: Literal["skip", "log"]) -> None:
    """A tenfold norm from some step on is logged, but no longer once it is the window's usual value."""
    config = FaultConfig(on_spike=policy, max_skips=100)
    guard, rng = trained(config), random.Random(5)
    judged = [guard.judge(0.6, 10 * rng.gauss(2, 0.3)).wrong is not None for _ in range(60)]
    assert judged[0]
    assert sum(judged) == (60 if policy == "skip" else sum(judged[: config.spike_window // 2]))


def test_a_spike_that_is_skipped_does_not_move_what_is_normal() -> None:
    guard = trained(FaultConfig(on_spike="skip", max_skips=100))
    window = list(guard.losses)
    for _ in range(50):
        assert not guard.judge(5.0, 2.0).apply
    assert list(guard.losses) == window


def test_a_resumed_guard_judges_as_if_never_stopped() -> None:
    config, rng = FaultConfig(on_spike="skip"), random.Random(3)
    steps = [(rng.gauss(0.6, 0.05) + 2 * (rng.random() < 0.05), rng.gauss(2, 0.3)) for _ in range(200)]
    whole = Guard(config, [], [], 0)
    expected = [whole.judge(*step) for step in steps]
    first = Guard(config, [], [], 0)
    got = [first.judge(*step) for step in steps[:77]]
    second = Guard(config, list(first.losses), list(first.norms), first.skipped)
    got += [second.judge(*step) for step in steps[77:]]
    assert got == expected
    assert second.skipped == whole.skipped > 0

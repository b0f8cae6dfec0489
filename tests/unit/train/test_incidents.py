"""Which steps look wrong, what is done about them, and what is written down."""

from __future__ import annotations

import math
import random

import pytest

from mpo_megatron.config import FaultConfig
from mpo_megatron.train.incidents import Guard


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
        assert guard.judge(-5.0, 0.001).wrong is None  # far below is good news
    few = trained(FaultConfig(on_spike="stop", spike_window=64), steps=15)
    assert few.judge(100.0, 100.0).wrong is None
    equal = Guard(FaultConfig(on_spike="stop"), [0.5] * 40, [1.0] * 40, 0)
    assert equal.judge(0.51, 1.05).wrong is None  # no spread at all must not make everything a spike


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

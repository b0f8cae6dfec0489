from __future__ import annotations

import numpy as np
import pytest

from mpo_megatron.data.rewards import (
    add_noise,
    choose_responses,
    in_fraction,
    measure_scale,
    normalize,
    spacing,
    summarize_spacing,
    swap_two_tokens,
)

IDS = [f"group-{index}" for index in range(4000)]


def test_noise_has_the_asked_spread_and_depends_on_the_id_only() -> None:
    zeros = np.zeros(4)
    draws = np.concatenate([add_noise(zeros, 0.5, name, seed=1) for name in IDS])
    # 16,000 draws: the mean's standard error is 0.5 / √16000 ≈ 0.004, the std's ≈ 0.0028; five of each.
    assert abs(draws.mean()) < 0.02
    assert abs(draws.std() - 0.5) < 0.014
    np.testing.assert_array_equal(add_noise(zeros, 0.5, "a", seed=1), add_noise(zeros, 0.5, "a", seed=1))
    np.testing.assert_allclose(add_noise(zeros, 1.0, "a", seed=1), 2 * add_noise(zeros, 0.5, "a", seed=1), rtol=1e-15)
    assert not np.array_equal(add_noise(zeros, 0.5, "a", seed=1), add_noise(zeros, 0.5, "a", seed=2))
    assert not np.array_equal(add_noise(zeros, 0.5, "a", seed=1), add_noise(zeros, 0.5, "b", seed=1))


def test_chosen_responses_are_nested_and_uniform() -> None:
    counts = np.zeros(8)
    for name in IDS:
        chosen = [set(choose_responses(8, keep, name, seed=3).tolist()) for keep in (2, 4, 6)]
        assert [len(item) for item in chosen] == [2, 4, 6]
        assert chosen[0] < chosen[1] < chosen[2]
        counts[list(chosen[1])] += 1
    # Each of 8 is among 4 with probability 1/2: 2000 of 4000, standard deviation √(4000/4) ≈ 32; five of these.
    assert abs(counts - 2000).max() < 160
    assert choose_responses(3, None, "a", seed=3).tolist() == [0, 1, 2]
    assert choose_responses(3, 8, "a", seed=3).tolist() == [0, 1, 2]


def test_the_best_response_stays() -> None:
    others = np.zeros(8)
    for name in IDS[:800]:
        chosen = [choose_responses(8, keep, name, seed=3, best=5).tolist() for keep in (2, 4)]
        assert 5 in chosen[0]
        assert set(chosen[0]) < set(chosen[1])
        others[chosen[0]] += 1
    # Each of the seven others is the second one with probability 1/7: 114 of 800, standard deviation 10; five of these.
    assert abs(np.delete(others, 5) - 800 / 7).max() < 50


def test_two_tokens_change_places() -> None:
    tokens = np.array([7, 7, 8, 9, 1], np.int32)
    movable = np.array([True, True, True, False, False])
    copies = swap_two_tokens(tokens, movable, 40, "a", seed=1)
    assert {tuple(copy.tolist()) for copy in copies} == {(8, 7, 7, 9, 1), (7, 8, 7, 9, 1)}
    assert tokens.tolist() == [7, 7, 8, 9, 1]
    np.testing.assert_array_equal(copies, swap_two_tokens(tokens, movable, 40, "a", seed=1))
    assert swap_two_tokens(tokens, np.array([True, True, False, False, False]), 2, "a", seed=1) == []
    assert swap_two_tokens(tokens, np.zeros(5, np.bool_), 2, "a", seed=1) == []


def test_fractions_are_nested() -> None:
    kept = [{name for name in IDS if in_fraction(name, share, seed=5)} for share in (0.1, 0.5, 1.0)]
    assert kept[0] < kept[1] < kept[2] == set(IDS)
    assert abs(len(kept[1]) - 2000) < 160


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        ("none", [1.0, 2.0, 6.0]),
        ("zscore", [-2 / np.sqrt(14 / 3), -1 / np.sqrt(14 / 3), 3 / np.sqrt(14 / 3)]),
        ("minmax", [0.0, 0.2, 1.0]),
        ("dataset_zscore", [-1.0, -0.5, 1.5]),
        ("dataset_minmax", [0.25, 0.375, 0.875]),
    ],
)
def test_normalisations_by_hand(kind: str, wanted: list[float]) -> None:
    scale = measure_scale(np.array([-1.0, 7.0]))._replace(mean=3.0 / 16, std=2.0 / 16)  # the range is 8 = 2⁴ / 2
    np.testing.assert_allclose(normalize(np.array([1.0, 2.0, 6.0]), kind, scale), wanted, rtol=1e-15)


@pytest.mark.parametrize("kind", ["zscore", "minmax", "dataset_zscore", "dataset_minmax"])
@pytest.mark.parametrize("unit", [1e-310, 1e-200, 1e30])
def test_normalised_rewards_do_not_depend_on_their_unit(kind: str, unit: float) -> None:
    """The square of 1e-200 is 0, which divided by it as a standard deviation of 0."""
    rewards = np.array([1.0, 2.0, 6.0])
    tiny = rewards * unit / 6
    wanted = normalize(rewards, kind, measure_scale(rewards))
    # Numbers of 1e-310 have 11 digits.
    np.testing.assert_allclose(normalize(tiny, kind, measure_scale(tiny)), wanted, rtol=1e-10 if unit == 1e-310 else 1e-14)


@pytest.mark.parametrize("kind", ["zscore", "minmax"])
def test_a_constant_group_becomes_zeros(kind: str) -> None:
    assert normalize(np.full(3, 0.1), kind).tolist() == [0.0, 0.0, 0.0]


def test_dataset_normalisation_needs_the_scale() -> None:
    with pytest.raises(ValueError, match="needs the data set's scale"):
        normalize(np.ones(2), "dataset_zscore")


def test_spacing_by_hand() -> None:
    assert spacing(np.array([3.0, 1.0, 1.0, 7.0])).tolist() == [0.0, 2.0, 4.0]
    stats = summarize_spacing(np.array([3.0, 1.0, 1.0, 7.0, 0.0, 1.0]), np.array([4, 2]))
    assert stats["mean"] == 7 / 4
    assert stats["median"] == 1.5
    assert stats["median_smallest"] == 0.5
    assert stats["tied_share"] == 0.25
    assert stats["mean_by_num_responses"] == {"2": 1.0, "4": 2.0}

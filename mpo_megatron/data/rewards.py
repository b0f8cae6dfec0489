"""Options that change a group's rewards or choose among its responses; all seeded, and independent of the data's order.

Each draw has its own generator, seeded by the seed, a purpose and the group's id. So another input order, another number of
workers or another `fraction` changes neither a group's noise nor its chosen responses.

Legend: K responses of a group.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from mpo_megatron.data.arrays import Bools, Float64, Int32, Int64

RewardNormalization = Literal["none", "zscore", "minmax", "dataset_zscore", "dataset_minmax"]


def hash_unit(seed: int, purpose: str, key: str) -> float:
    """A number in [0, 1) that depends only on the arguments."""
    return int.from_bytes(_key(seed, purpose, key)[:8], "little") / 2**64


def _key(seed: int, purpose: str, key: str) -> bytes:
    return hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()


def _generator(seed: int, purpose: str, group_id: str) -> np.random.Generator:
    return np.random.default_rng(np.frombuffer(_key(seed, purpose, group_id), np.uint32).tolist())


def in_fraction(group_id: str, fraction: float, *, seed: int) -> bool:
    """Whether a group belongs to the chosen share of the data. Nested: a larger fraction contains every smaller one.

    Source: MPO figure 5 (share of the training data).
    """
    return hash_unit(seed, "fraction", group_id) < fraction


def add_noise(rewards: Float64, sigma: float, group_id: str, *, seed: int) -> Float64:
    """Rewards [K] plus independent N(0, σ²) noise. Another σ scales the same draw.

    Source: MPO appendix A.4 (noise added to the rewards that select Y+ and Y−).
    """
    return rewards + sigma * _generator(seed, "reward_noise", group_id).standard_normal(len(rewards))


def choose_responses(num_responses: int, keep: int | None, group_id: str, *, seed: int, best: int | None = None) -> Int64:
    """Indices, ascending, of `keep` of K responses drawn at random (all if `keep` is None or K is smaller).

    Nested: with a larger `keep`, the chosen ones stay chosen. Source: MPO figure 4 and table 7 (responses per prompt).

    Args:
        best: a response that is always kept (MC-PO: the preferred one, with fewer candidates)
    """
    if keep is None or keep >= num_responses:
        return np.arange(num_responses, dtype=np.int64)
    order = _generator(seed, "responses_per_prompt", group_id).permutation(num_responses)
    if best is not None:
        order = np.concatenate([[best], order[order != best]])
    return np.sort(order[:keep]).astype(np.int64)


def swap_two_tokens(tokens: Int32, movable: Bools, number: int, group_id: str, *, seed: int) -> list[Int32]:
    """Up to `number` copies of a response [R], each with two different random tokens swapped.

    Source: MC-PO section 5 and table 2 (noise samples among the candidates).

    Args:
        movable: [R] tokens that may be swapped: not the end token, nor tokens that the model did not generate
    """
    places = np.flatnonzero(movable)
    if len(np.unique(tokens[places])) < 2:
        return []
    generator, copies = _generator(seed, "swap", group_id), list[Int32]()
    while len(copies) < number:
        first, second = generator.choice(places, size=2, replace=False)
        if tokens[first] != tokens[second]:
            copy = tokens.copy()
            copy[[first, second]] = copy[[second, first]]
            copies.append(copy)
    return copies


class RewardScale(NamedTuple):
    """Statistics of rewards in units of 2^`exponent`, in which neither squares overflow nor those of tiny spreads vanish."""

    exponent: int
    mean: float
    std: float
    """Population standard deviation."""
    low: float
    high: float


def measure_scale(rewards: Float64) -> RewardScale:
    """Mean, standard deviation and range of rewards [N]; the unit makes the range at least ½ and below 1."""
    exponent = int(np.frexp(rewards.max() - rewards.min())[1])
    scaled = np.ldexp(rewards, -exponent)
    return RewardScale(exponent, float(scaled.mean()), float(scaled.std()), float(scaled.min()), float(scaled.max()))


def normalize(rewards: Float64, kind: RewardNormalization, scale: RewardScale | None = None) -> Float64:
    """Rewards [K] shifted and scaled: by the group's own statistics, or by the data set's (`scale`).

    `zscore`: (S − mean) / std with the population std; `minmax`: (S − min) / (max − min). A constant group, or data set, becomes
    zeros.
    """
    if kind == "none":
        return rewards
    own = measure_scale(rewards) if kind in ("zscore", "minmax") else scale
    if own is None:
        raise ValueError(f"normalize(kind={kind!r}) needs the data set's scale")
    shift, width = (own.mean, own.std) if kind.endswith("zscore") else (own.low, own.high - own.low)
    if own.low == own.high:
        return np.zeros_like(rewards)
    return (np.ldexp(rewards, -own.exponent) - shift) / width


def spacing(rewards: Float64) -> Float64:
    """Gaps [… K − 1] between neighbours of the sorted rewards; 0 for a tie.

    Source: MPO appendix A.5 (mean gap Δ, which falls roughly as 1/K) and Theorem 2.
    """
    return np.diff(np.sort(rewards))


def split_by_size[Kind: np.generic](values: npt.NDArray[Kind], sizes: Int64) -> Iterator[tuple[int, Int64, npt.NDArray[Kind]]]:
    """For each K in ascending order: K, the indices [n] of the groups with K responses, and their values [n, K].

    Args:
        values: [ΣK] of all groups, one after the other
        sizes: [G] K of each group
    """
    starts = np.cumsum(sizes) - sizes
    for size in np.unique(sizes).tolist():
        groups = np.flatnonzero(sizes == size)
        yield size, groups, values[starts[groups, None] + np.arange(size)]


def summarize_spacing(rewards: Float64, sizes: Int64) -> dict[str, Any]:
    """Statistics of the gaps over groups: mean and median gap, smallest gap of a group, share of ties, mean gap by K.

    Args:
        rewards: [ΣK] of all groups, one after the other
        sizes: [G] K of each group, at least 2
    """
    firsts = np.cumsum(sizes - 1) - (sizes - 1)
    every, smallest = np.empty(len(rewards) - len(sizes)), np.empty(len(sizes))
    by_size: dict[int, Float64] = {}
    for size, groups, values in split_by_size(rewards, sizes):
        gaps = spacing(values)
        every[firsts[groups, None] + np.arange(size - 1)] = gaps
        smallest[groups] = gaps.min(axis=1)
        by_size[size] = gaps.mean(axis=1)
    return {
        "mean": float(every.mean()),
        "median": float(np.median(every)),
        "median_smallest": float(np.median(smallest)),
        "tied_share": float((every == 0).mean()),
        "mean_by_num_responses": {str(size): float(np.mean(means)) for size, means in by_size.items()},
    }

"""A plot of the gaps between a data set's rewards: the differences that a partition relies on.

Legend: K responses of a group.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.data.arrays import Float64, Int8, Int64
from mpo_megatron.data.rewards import spacing, split_by_size
from mpo_megatron.rollout.panels import BLUE, GREEN, ORANGE, RED, draw_panels


def plot_spacing(rewards: Float64, sizes: Int64, labels: Int8, picture: Path) -> None:
    """Mean gap by K, rewards by rank, and the spread of groups, in one row.

    Args:
        rewards: [ΣK] of all groups, one after the other
        sizes: [G] K of each group
        labels: [ΣK], 1 for Y+ and 0 for Y−; empty without sets
    """
    starts = np.cumsum(sizes) - sizes
    with draw_panels(picture, 3, width=13) as (by_size, by_rank, spread):
        _draw_gaps(by_size, rewards, sizes)
        _draw_ranks(by_rank, rewards, sizes, labels)
        spread.hist(np.maximum.reduceat(rewards, starts) - np.minimum.reduceat(rewards, starts), bins=30, color=BLUE)
        spread.set_title("spread of a group: best − worst reward", fontsize=10)
        spread.set_xlabel("reward")
        spread.set_ylabel("groups")


def _draw_gaps(panel: Any, rewards: Float64, sizes: Int64) -> None:
    """The mean gap of neighbouring rewards, by K; of one K, the distribution of gaps.

    Source: MPO appendix A.5 (the gap falls about as 1/K).
    """
    gaps = {size: spacing(values).ravel() for size, _, values in split_by_size(rewards, sizes)}
    if len(gaps) == 1:
        ((size, values),) = gaps.items()
        panel.hist(values, bins=30, color=BLUE)
        panel.axvline(np.mean(values), color=ORANGE, label=f"mean {np.mean(values):.3g}")
        panel.set_title(f"gaps of neighbouring rewards, K = {size}", fontsize=10)
        panel.set_xlabel("gap")
        panel.set_ylabel("gaps")
    else:
        means = [float(np.mean(values)) for values in gaps.values()]
        panel.plot(list(gaps), means, "o-", color=BLUE, label="data")
        weight = sum(map(len, gaps.values()))
        scale = sum(mean * size * len(gaps[size]) for mean, size in zip(means, gaps, strict=True)) / weight
        panel.plot(list(gaps), [scale / size for size in gaps], "--", color=ORANGE, label="∝ 1/K")
        panel.set_title("mean gap of neighbouring rewards", fontsize=10)
        panel.set_xlabel("responses in a group, K")
        panel.set_ylabel("gap")
    panel.legend(fontsize=8, frameon=False)


def _draw_ranks(panel: Any, rewards: Float64, sizes: Int64, labels: Int8) -> None:
    """Mean and standard deviation of the reward at each rank, over the groups of the commonest K; Y+ and Y− apart."""
    size = Counter(sizes.tolist()).most_common(1)[0][0]
    chosen = next(values for number, _, values in split_by_size(rewards, sizes) if number == size)
    orders = np.argsort(-chosen, axis=1, kind="stable")
    ordered = np.take_along_axis(chosen, orders, axis=1)
    ranks, means, errors = np.arange(1, size + 1), ordered.mean(axis=0), ordered.std(axis=0)
    panel.errorbar(ranks, means, yerr=errors, fmt="o-", color=BLUE, capsize=2, label="mean ± std over groups")
    if len(labels):
        own = next(values for number, _, values in split_by_size(labels, sizes) if number == size)
        positive = np.take_along_axis(own, orders, axis=1).mean(axis=0)
        share = panel.twinx()
        share.bar(ranks, positive, color=GREEN, alpha=0.25, width=0.8)
        share.bar(ranks, 1 - positive, bottom=positive, color=RED, alpha=0.15, width=0.8)
        share.set_ylim(0, 1)
        share.set_ylabel("share in Y+ (green) and Y− (red)")
        share.spines[["top"]].set_visible(False)
    panel.set_title(f"reward by rank, K = {size} ({len(chosen):,} groups)", fontsize=10)
    panel.set_xlabel("rank")
    panel.set_ylabel("reward")
    panel.legend(fontsize=8, frameon=False)

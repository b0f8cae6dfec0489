"""A plot of the gaps between a data set's rewards: the differences that a partition relies on.

Legend: K responses of a group.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.data.arrays import Float64
from mpo_megatron.data.rewards import spacing
from mpo_megatron.rollout.panels import BLUE, GREEN, ORANGE, RED, draw_panels


def plot_spacing(rewards: Sequence[Float64], labels: Sequence[Sequence[int]], picture: Path) -> None:
    """Draw the mean gap by K, rewards by rank, and the spread of groups, side by side.

    Args:
        rewards: [K] of each group
        labels: [K] of each group, 1 for Y+ and 0 for Y−; empty without sets
    """
    with draw_panels(picture, 3, width=13) as (by_size, by_rank, spread):
        _draw_gaps(by_size, rewards)
        _draw_ranks(by_rank, rewards, labels)
        spread.hist([group.max() - group.min() for group in rewards], bins=30, color=BLUE)
        spread.set_title("spread of a group: best − worst reward", fontsize=10)
        spread.set_xlabel("reward")
        spread.set_ylabel("groups")


def _draw_gaps(panel: Any, rewards: Sequence[Float64]) -> None:
    """The mean gap between neighbouring rewards, by K; for a single K, the distribution of gaps.

    Source: MPO appendix A.5 (the gap falls roughly as 1/K).
    """
    gaps: dict[int, list[float]] = defaultdict(list)
    for group in rewards:
        gaps[len(group)].extend(spacing(group).tolist())
    if len(gaps) == 1:
        ((size, values),) = gaps.items()
        panel.hist(values, bins=30, color=BLUE)
        panel.axvline(np.mean(values), color=ORANGE, label=f"mean {np.mean(values):.3g}")
        panel.set_title(f"gaps of neighbouring rewards, K = {size}", fontsize=10)
        panel.set_xlabel("gap")
        panel.set_ylabel("gaps")
    else:
        sizes = sorted(gaps)
        means = [float(np.mean(gaps[size])) for size in sizes]
        panel.plot(sizes, means, "o-", color=BLUE, label="data")
        weight = sum(len(gaps[size]) for size in sizes)
        scale = sum(mean * size * len(gaps[size]) for mean, size in zip(means, sizes, strict=True)) / weight
        panel.plot(sizes, [scale / size for size in sizes], "--", color=ORANGE, label="∝ 1/K")
        panel.set_title("mean gap of neighbouring rewards", fontsize=10)
        panel.set_xlabel("responses in a group, K")
        panel.set_ylabel("gap")
    panel.legend(fontsize=8, frameon=False)


def _draw_ranks(panel: Any, rewards: Sequence[Float64], labels: Sequence[Sequence[int]]) -> None:
    """Mean and standard deviation of the reward at each rank, over groups of the most common K; Y+ and Y− separately."""
    size = Counter(map(len, rewards)).most_common(1)[0][0]
    chosen = [index for index, group in enumerate(rewards) if len(group) == size]
    orders = [np.argsort(-rewards[index], kind="stable") for index in chosen]
    ordered = np.array([rewards[index][order] for index, order in zip(chosen, orders, strict=True)])
    ranks, means, errors = np.arange(1, size + 1), ordered.mean(axis=0), ordered.std(axis=0)
    panel.errorbar(ranks, means, yerr=errors, fmt="o-", color=BLUE, capsize=2, label="mean ± std over groups")
    if labels:
        positive = np.array([np.array(labels[index])[order] for index, order in zip(chosen, orders, strict=True)]).mean(axis=0)
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

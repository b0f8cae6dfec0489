"""A plot of sampled reward, wins and length by round, one colour per method."""

from __future__ import annotations

from pathlib import Path
from typing import Any

COLOURS = ("#1f6fb4", "#e07b1a", "#2a9150", "#c23b3b", "#7a51a8", "#6b6b6b")


def plot_rounds(summary: dict[str, Any], picture: Path) -> None:
    """Reward with each seed as a thin line and error bars over seeds; wins against the previous policy; tokens per answer."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, without a display
    import matplotlib.pyplot as plt

    figure, (reward, wins, tokens) = plt.subplots(1, 3, figsize=(13, 3.8))
    for colour, method in zip(COLOURS, summary["methods"].values(), strict=False):
        rounds = range(len(method["reward"]))
        for curve in method["reward_by_seed"].values():
            reward.plot(rounds, curve, color=colour, linewidth=0.7, alpha=0.35)
        reward.errorbar(rounds, method["reward"], yerr=method["error"], fmt="o-", color=colour, capsize=3, label=method["label"])
        wins.plot(rounds[1:], method["win_rate"], "o-", color=colour)
        tokens.plot(rounds[1:], method["tokens"], "o-", color=colour)
    reward.set_title(f"sampled reward on held-out prompts, {len(summary['seeds'])} seeds", fontsize=10)
    wins.axhline(0.5, color="grey", linewidth=0.8, linestyle="--")
    wins.set_title("win rate against the previous policy", fontsize=10)
    tokens.set_title("tokens per answer", fontsize=10)
    for panel in (reward, wins, tokens):
        panel.set_xlabel("round")
        panel.set_xticks(range(len(next(iter(summary["methods"].values()))["reward"])))
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
    reward.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    plt.close(figure)

"""A plot of a run's curves, from its `metrics.jsonl`."""

from __future__ import annotations

import json
from pathlib import Path

BLUE, ORANGE, GREEN, RED = "#1f6fb4", "#e07b1a", "#2a9150", "#c23b3b"


def plot_curves(metrics_file: Path, picture: Path) -> None:
    """Loss, accuracy, margin and log-ratios over the steps: training as lines, held-out groups as dots."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, without a display
    import matplotlib.pyplot as plt

    rows = [json.loads(line) for line in metrics_file.read_text().splitlines()]
    figure, axes = plt.subplots(1, 4, figsize=(15, 3.4))
    panels = {
        "loss": ("loss (nats)", [("loss", BLUE, "")]),
        "accuracy": ("accuracy (share of pairs)", [("accuracy", BLUE, "")]),
        "margin": ("margin of log π/π_ref (nats)", [("margin", BLUE, "")]),
        "log-ratio": (
            "mean log π/π_ref (nats)",
            [("chosen_log_ratio", GREEN, "preferred, "), ("rejected_log_ratio", RED, "others, ")],
        ),
    }
    for panel, (title, curves) in zip(axes, panels.values(), strict=True):
        for name, colour, label in curves:
            training = [(row["step"], row[name]) for row in rows if row.get(name) is not None]
            held_out = [(row["step"], row[f"eval/{name}"]) for row in rows if row.get(f"eval/{name}") is not None]
            panel.plot(*zip(*training, strict=True), color=colour, linewidth=1.2, alpha=0.7, label=f"{label}training")
            if held_out:
                dots = ORANGE if len(curves) == 1 else colour
                panel.plot(*zip(*held_out, strict=True), "o--", color=dots, markersize=4, linewidth=0.8, label=f"{label}held out")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("step")
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
        panel.legend(fontsize=8, frameon=False)
    figure.tight_layout()
    figure.savefig(picture, dpi=90)
    plt.close(figure)

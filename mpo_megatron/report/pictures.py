"""The page's curves and distributions as PNG files, for papers and chats."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

COLOURS = ("#3b6fd4", "#e0812b", "#2f9e62", "#b5489a", "#7a63d2", "#8a6d3b")
NAMES = {"chosen_log_ratio": "preferred", "rejected_log_ratio": "others", "seconds": "step", "data_wait": "data wait"}
PER_ROW = 4


def write_pictures(shown: dict[str, Any], folder: Path) -> list[Path]:
    """Write `curves.png`, and `distributions.png` of the first run, if there is something to draw; the files."""
    import matplotlib

    matplotlib.use("Agg")  # draws to files, without a display
    folder.mkdir(parents=True, exist_ok=True)
    runs, files = shown["runs"], []
    charts = [chart for chart in shown["charts"] if any(name in run["curves"] for run in runs for name in chart["metrics"])]
    if charts:
        files.append(folder / "curves.png")
        draw_curves(charts, runs, files[-1])
    if runs[0]["data"] or runs[0]["drift"]:
        files.append(folder / "distributions.png")
        draw_distributions(runs[0], files[-1])
    return files


def draw_curves(charts: list[Any], runs: list[Any], path: Path) -> None:
    """One panel per chart: training as lines, held-out groups as dots."""
    panels, several = _panels(len(charts)), len(runs) > 1
    for chart, panel in zip(charts, panels, strict=True):
        for number, run in enumerate(runs):
            for which, metric in enumerate(chart["metrics"]):
                colour = COLOURS[(number if several else which) % len(COLOURS)]
                names = [run["name"] if several else "", NAMES.get(metric, "") if len(chart["metrics"]) > 1 else ""]
                label = ", ".join(name for name in names if name)
                curve = run["curves"].get(metric, {})
                if "training" in curve:
                    style = "-" if which == 0 or not several else ":"
                    panel.plot(
                        *curve["training"],
                        style,
                        color=colour,
                        linewidth=1.1,
                        alpha=0.75,
                        label=f"{label}, training".removeprefix(", "),
                    )
                if "held_out" in curve:
                    points = {"color": colour, "markersize": 4, "linewidth": 1.0, "markeredgecolor": "white"}
                    panel.plot(*curve["held_out"], "o--", label=f"{label}, held out".removeprefix(", "), **points)
        _finish(panel, chart["title"], "step", chart["unit"])
    _save(panels, path)


def draw_distributions(run: dict[str, Any], path: Path) -> None:
    """The data's histograms, and the log-ratios at the first and last evaluation."""
    panels = _panels(len(run["data"]) + (1 if run["drift"] else 0))
    for chart, panel in zip(run["data"], panels, strict=False):
        for number, (name, shares) in enumerate(chart["series"].items()):
            panel.stairs(shares, chart["edges"], fill=True, alpha=0.45, color=COLOURS[number], label=name)
        _finish(panel, chart["title"], chart["unit"], "share")
    if run["drift"]:
        panel, drift = panels[-1], run["drift"]
        for counts, colour, name in zip(drift["counts"][-1], (COLOURS[2], "#d0484a"), ("preferred", "others"), strict=True):
            panel.stairs(counts, drift["edges"], fill=True, alpha=0.45, color=colour, label=name)
        _finish(panel, f"log π/π_ref after step {drift['steps'][-1]}", "nats", "responses")
    _save(panels, path)


def _panels(count: int) -> list[Any]:
    import matplotlib.pyplot as plt

    columns = min(PER_ROW, count)
    rows = math.ceil(count / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False)
    for spare in axes.flat[count:]:
        spare.set_visible(False)
    figure.set_dpi(110)
    return list(axes.flat[:count])


def _finish(panel: Any, title: str, x: str, y: str) -> None:
    panel.set_title(title, fontsize=11, loc="left", fontweight="bold")
    panel.set_xlabel(x, fontsize=9)
    panel.set_ylabel(y, fontsize=9)
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.tick_params(labelsize=8)
    panel.legend(fontsize=8, frameon=False)


def _save(panels: list[Any], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure = panels[0].figure
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)

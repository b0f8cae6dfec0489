"""The comparison as a plot: accuracy over steps, accuracy and drift, log-ratios of both sets, work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # draws to files, without a display
import matplotlib.pyplot as plt
from PIL import Image

COLOURS = ("#1f6fb4", "#2a9150", "#8452a8", "#e07b1a", "#c23b3b", "#8a6d3b", "#4d4d4d")
"""One per family, in the order in which families appear."""
MARKERS = "osD^vPX"
"""One per method of a family; colour and marker name a method in every panel."""


def plot_comparison(comparison: dict[str, Any], picture: Path) -> None:
    """Draw `comparison` (see report.py) to a PNG file."""
    methods = comparison["methods"]
    styles = _choose_styles(methods)
    height = 0.27 * len(methods) + 1.4
    figure, panels = plt.subplots(2, 2, figsize=(13, 4.2 + height), height_ratios=(4.2, height), constrained_layout=True)
    _draw_curves(panels[0, 0], methods, styles)
    _draw_drift(panels[0, 1], methods, styles)
    _draw_log_ratios(panels[1, 0], methods, styles)
    _draw_work(panels[1, 1], methods, styles)
    for panel in panels.flat:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(alpha=0.25, linewidth=0.6)
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize=9, frameon=False)
    seeds = len(comparison["seeds"])
    runs = f"{seeds} seed{'s: means' if seeds > 1 else ''}"
    title = f"The quickstart's task, {comparison['steps']} steps, {runs}; one learning rate and one β, nothing tuned per method"
    figure.suptitle(title, fontsize=11)
    figure.savefig(picture, dpi=90)
    with Image.open(picture) as image:  # 128 colours: half the size, to commit it
        image.convert("RGB").quantize(colors=128).save(picture, optimize=True)
    plt.close(figure)


def _choose_styles(methods: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    families = list(dict.fromkeys(method["family"] for method in methods))
    members: dict[str, int] = dict.fromkeys(families, 0)
    styles = {}
    for method in methods:
        family = method["family"]
        styles[method["name"]] = {
            "color": COLOURS[families.index(family) % len(COLOURS)],
            "marker": MARKERS[members[family] % len(MARKERS)],
        }
        members[family] += 1
    return styles


def _draw_curves(panel: Any, methods: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for method in methods:
        steps = [point["step"] for point in method["curve"]]
        accuracy = [100 * point["accuracy"] for point in method["curve"]]
        panel.plot(steps, accuracy, label=method["name"], markersize=5, linewidth=1.2, alpha=0.85, **styles[method["name"]])
    panel.set_title("held-out accuracy of log π/π_ref (% of pairs)", fontsize=10)
    panel.set_xlabel("step")


def _draw_drift(panel: Any, methods: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for method in methods:
        final = method["final"]
        panel.errorbar(
            final["chosen"]["mean"],
            100 * final["accuracy"]["mean"],
            xerr=final["chosen"]["spread"] or None,
            yerr=100 * max(method["accuracy_error"], final["accuracy"]["spread"]),
            markersize=7,
            linewidth=0.8,
            alpha=0.85,
            linestyle="",
            **styles[method["name"]],
        )
    panel.axvline(0, color="black", linewidth=0.6)
    panel.set_title("held-out accuracy (%) against drift of the preferred", fontsize=10)
    panel.set_xlabel("mean log π/π_ref over Y+ (nats); below 0: less likely than before")


def _draw_log_ratios(panel: Any, methods: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for row, method in enumerate(methods):
        chosen, rejected = method["final"]["chosen"]["mean"], method["final"]["rejected"]["mean"]
        colour = styles[method["name"]]["color"]
        panel.plot([rejected, chosen], [row, row], color=colour, linewidth=2, alpha=0.6)
        panel.plot(chosen, row, "o", color=colour, markersize=7)
        panel.plot(rejected, row, "o", markeredgecolor=colour, markerfacecolor="white", markersize=7)
        panel.annotate(
            f"{chosen - rejected:.1f}", (max(chosen, rejected), row), xytext=(8, -3), textcoords="offset points", fontsize=8
        )
    panel.axvline(0, color="black", linewidth=0.6)
    panel.margins(x=0.1)
    panel.set_title("mean log π/π_ref (nats): ● preferred, ○ others; margin", fontsize=10)
    _name_rows(panel, methods, styles)


def _draw_work(panel: Any, methods: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    for row, method in enumerate(methods):
        tokens, share = (method["final"][name]["mean"] for name in ("tokens_per_step", "backward_share"))
        colour = styles[method["name"]]["color"]
        panel.barh(row, tokens, color=colour, alpha=0.35, height=0.65)
        panel.barh(row, share * tokens, color=colour, alpha=0.7, height=0.65)
        note = f" {tokens:,.0f}" + (f", {share:.0%} in backward" if share < 1 else "")
        panel.annotate(note, (tokens, row), va="center", fontsize=8)
    panel.margins(x=0.4)
    panel.set_title("tokens in a step's rows; dark: also in its backward pass", fontsize=10)
    panel.set_yticks(range(len(methods)), [])  # the panel to the left shows the names
    panel.invert_yaxis()


def _name_rows(panel: Any, methods: list[dict[str, Any]], styles: dict[str, dict[str, Any]]) -> None:
    panel.set_yticks(range(len(methods)), [method["name"] for method in methods], fontsize=9)
    panel.invert_yaxis()
    for label, method in zip(panel.get_yticklabels(), methods, strict=True):
        label.set_color(styles[method["name"]]["color"])

"""A plot of an evaluation: one panel per measurement."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mpo_megatron.config import EvaluateConfig
from mpo_megatron.rollout.panels import BLUE, GREEN, ORANGE, draw_panels


def plot_evaluation(results: dict[str, Any], values: dict[str, Any], config: EvaluateConfig, picture: Path) -> None:
    """Plot margins of held-out groups, rewards of samples and win rates, if measured.

    Args:
        results: content of evaluation.json
        values: `margins` of held-out groups; mean rewards per prompt of the `candidate` and the `baseline`
    """
    drawings: list[Callable[[Any], None]] = []
    if "margins" in values:
        drawings.append(lambda panel: _draw_margins(panel, results["held_out"], values["margins"]))
    if "candidate" in values:
        drawings.append(lambda panel: _draw_rewards(panel, results, values, config))
    if "comparison" in results:
        drawings.append(lambda panel: _draw_win_rates(panel, results["comparison"], config))
    with draw_panels(picture, len(drawings), width=4.6 * len(drawings)) as panels:
        for panel, draw in zip(panels, drawings, strict=True):
            draw(panel)


def _draw_margins(panel: Any, summary: dict[str, Any], margins: Any) -> None:
    panel.hist(margins, bins=30, color=BLUE)
    panel.axvline(0, color="black", linewidth=0.8)
    panel.axvline(summary["margin"]["value"], color=ORANGE, label=f"mean {summary['margin']['value']:+.3g}")
    panel.set_title(f"held out: accuracy {summary['accuracy']['value']:.1%}", fontsize=10)
    panel.set_xlabel("margin of log π/π_ref, nats")
    panel.set_ylabel("groups")
    panel.legend(fontsize=8, frameon=False)


def _draw_rewards(panel: Any, results: dict[str, Any], values: dict[str, Any], config: EvaluateConfig) -> None:
    everything = np.concatenate([values[role] for role in ("candidate", "baseline") if role in values])
    bins = np.linspace(everything.min(), everything.max(), 31) if np.ptp(everything) else 10
    for role, name, color in (("baseline", config.baseline_name, ORANGE), ("candidate", config.name, BLUE)):
        if role in values:
            mean = results[role]["reward"]["value"]
            panel.hist(values[role], bins=bins, color=color, alpha=0.6, label=f"{name}: mean {mean:.3g}")
    panel.set_title("sampled reward, mean per prompt", fontsize=10)
    panel.set_xlabel("reward")
    panel.set_ylabel("prompts")
    panel.legend(fontsize=8, frameon=False)


def _draw_win_rates(panel: Any, comparison: dict[str, Any], config: EvaluateConfig) -> None:
    for place, (name, label) in enumerate((("win_rate", "win rate"), ("length_controlled_win_rate", "length-controlled"))):
        estimate = comparison[name]
        errors = [[estimate["value"] - estimate["low"]], [estimate["high"] - estimate["value"]]]
        panel.bar(place, estimate["value"], color=(BLUE, GREEN)[place], width=0.6, label=label)
        panel.errorbar(place, estimate["value"], yerr=np.maximum(errors, 0), color="black", capsize=4)
    panel.axhline(0.5, color="black", linewidth=0.8, linestyle="--")
    panel.set_xticks([0, 1], ["win rate", "length-controlled"])
    panel.set_ylim(0, 1)
    ties = comparison["ties"] / comparison["pairs"]
    panel.set_title(f"{config.name} against {config.baseline_name}, {ties:.0%} tied", fontsize=10)

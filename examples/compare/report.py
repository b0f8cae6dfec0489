"""The comparison as numbers and as a table on the terminal."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from benchmarks.timing import describe_machine

if TYPE_CHECKING:
    from examples.compare.run import Method

FINAL = ("accuracy", "ranking_accuracy", "plain_accuracy", "margin", "chosen", "rejected", "kl")
COST = ("seconds_per_step", "training_seconds", "tokens_per_step", "backward_share")
CAVEAT = (
    "A toy: a random model of 0.6 M parameters, one procedural task, one learning rate and one β for all, nothing tuned per "
    "method. It shows that the methods run and what they do here, but ranks nothing; another order of the data (--seeds) changes "
    "accuracies by more than the standard error."
)


def build_comparison(
    methods: Sequence[Method], results: Mapping[str, Mapping[int, dict[str, Any]]], steps: int
) -> dict[str, Any]:
    """Mean and spread of each method over seeds, at the end and at each measured step.

    `spread` is the standard deviation over seeds: 0 with one seed. `accuracy_error` is the standard error due to the number of
    held-out groups; more seeds do not reduce it.
    """
    return {
        "machine": {**describe_machine(), "clock": "wall"},
        "steps": steps,
        "seeds": sorted(next(iter(results.values()))),
        "caveat": CAVEAT,
        "methods": [{**dataclasses.asdict(method), **_summarize(list(results[method.name].values()))} for method in methods],
    }


def _summarize(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    last = [run["curve"][-1] for run in runs]
    values = {name: [point[name] for point in last] for name in FINAL} | {name: [run[name] for run in runs] for name in COST}
    points = zip(*(run["curve"] for run in runs), strict=True)
    return {
        "final": {name: {"mean": statistics.fmean(many), "spread": _spread(many)} for name, many in values.items()},
        "accuracy_error": math.sqrt(statistics.fmean(point["accuracy_error"] ** 2 for point in last)),
        "curve": [{name: statistics.fmean(point[name] for point in seeds) for name in ("step", *FINAL)} for seeds in points],
    }


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def print_table(comparison: dict[str, Any]) -> None:
    """One line per method, in the order of methods.yaml, not sorted by result."""
    seeds = len(comparison["seeds"])
    table = Table(
        title=f"Held-out groups after {comparison['steps']} steps" + (f", mean over {seeds} seeds" if seeds > 1 else ""),
        caption=f"s = log π/π_ref, nats. accuracy: pairs Y+ × Y−, ± standard error of the held-out groups"
        f"{', then spread over seeds' if seeds > 1 else ''}; ranking: pairs of different reward; plain: log π per token instead "
        f"of s; tokens: those a step computes; backward: the share of them that pass through the backward pass. {CAVEAT}",
        caption_justify="left",
    )
    table.add_column("method", no_wrap=True)
    for title in ("accuracy", "ranking", "plain", "margin", "s chosen", "s rejected", "time / step", "tokens", "backward"):
        table.add_column(title, justify="right", no_wrap=True)
    for method in comparison["methods"]:
        table.add_row(*format_row(method, several_seeds=seeds > 1))
    # Piped output gets the whole table too.
    console = Console()
    Console(width=None if console.is_terminal else 130).print(table)


def format_row(method: dict[str, Any], *, several_seeds: bool) -> list[str]:
    """The cells of one method."""
    final = {name: value["mean"] for name, value in method["final"].items()}
    spread = f" ({100 * method['final']['accuracy']['spread']:.1f})" if several_seeds else ""
    return [
        method["name"],
        f"{100 * final['accuracy']:.1f} ± {100 * method['accuracy_error']:.1f}{spread} %",
        f"{100 * final['ranking_accuracy']:.1f} %",
        f"{100 * final['plain_accuracy']:.1f} %",
        f"{final['margin']:.1f}",
        f"{final['chosen']:+.1f}",
        f"{final['rejected']:+.1f}",
        f"{final['seconds_per_step']:.2f} s",
        f"{final['tokens_per_step']:,.0f}",
        f"{100 * final['backward_share']:.0f} %",
    ]

"""Metrics over steps, thinned to the points that a plot needs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mpo_megatron.report.run_record import RunRecord

MOST_POINTS = 2000
"""Maximum points of a curve; a screen shows no more."""

Points = tuple[list[int], list[float]]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """One plot."""

    title: str
    unit: str
    metrics: tuple[str, ...]
    """Names in metrics.jsonl; several are drawn together."""
    about: str
    """How to read it, in a sentence."""
    section: str
    wide: bool = False
    """Whether it is twice as wide."""


CHARTS = (
    Chart(
        section="Learning",
        title="Loss",
        unit="nats",
        metrics=("loss",),
        about="Should fall on held-out groups too; if only training loss falls, the run overfits.",
    ),
    Chart(
        section="Learning",
        title="Accuracy",
        unit="share of pairs",
        metrics=("accuracy",),
        about="How often a preferred response gained more log-prob than another one of its group. Without learning, it is 0.5.",
    ),
    Chart(
        section="Learning",
        title="Margin",
        unit="nats",
        metrics=("margin",),
        about="Mean log π/π_ref of preferred responses minus that of the others.",
    ),
    Chart(
        section="Learning",
        title="Log-probability drift",
        unit="nats",
        metrics=("chosen_log_ratio", "rejected_log_ratio"),
        about="Mean log π/π_ref. If both fall, preferred responses also get less likely, but less so than the others.",
        wide=True,
    ),
    Chart(
        section="Learning",
        title="KL from the reference",
        unit="nats",
        metrics=("kl",),
        about="Mean of −log π/π_ref: estimates KL(π_ref ‖ π) where the responses are the reference's own samples.",
    ),
    Chart(
        section="Optimization",
        title="Gradient norm",
        unit="",
        metrics=("grad_norm",),
        about="Before clipping. Isolated spikes come from single batches; a rising trend needs a smaller learning rate.",
    ),
    Chart(
        section="Optimization",
        title="Adapter norm",
        unit="",
        metrics=("adapter_norm",),
        about="Frobenius norm of an adapter's (LoRA) whole update of the weights, scale · B · A, before the step's update.",
    ),
    Chart(section="Optimization", title="Learning rate", unit="", metrics=("lr",), about="The schedule as applied."),
    Chart(
        section="Optimization",
        title="Groups without contrast",
        unit="groups per step",
        metrics=("skipped_groups",),
        about="Groups with equal rewards teach nothing and are skipped.",
    ),
    Chart(
        section="Optimization",
        title="Balance of experts",
        unit="",
        metrics=("load_balancing_loss",),
        about="The load-balancing loss, mean over layers, without its coefficient: 1 if every expert gets an equal share.",
    ),
    Chart(
        section="Optimization",
        title="Router drift",
        unit="share of choices",
        metrics=("router_drift",),
        about="Expert choices, over tokens and layers, that differ from the reference's.",
    ),
    Chart(
        section="Speed",
        title="Throughput",
        unit="tokens / s",
        metrics=("tokens_per_second",),
        about="Tokens of all ranks; a prompt counts once per group.",
    ),
    Chart(
        section="Speed",
        title="Model FLOPs utilization",
        unit="share of peak",
        metrics=("mfu",),
        about="Model operations per second over the GPU's bf16 peak; recomputation does not count.",
    ),
    Chart(
        section="Speed",
        title="Model TFLOP/s per rank",
        unit="10¹² / s",
        metrics=("tflops_per_rank",),
        about="Model operations per second and rank; recomputation does not count.",
    ),
    Chart(
        section="Speed",
        title="Time per step",
        unit="s",
        metrics=("seconds", "data_wait"),
        about="Time of a step, and the longest wait of a rank for its data.",
        wide=True,
    ),
    Chart(
        section="Speed",
        title="Slowest replica",
        unit="ratio to the mean",
        metrics=("step_seconds_max_over_mean",),
        about="1 if all ranks take equally long; well above 1, they wait for a slow one.",
    ),
    Chart(
        section="Speed",
        title="Peak memory",
        unit="GiB",
        metrics=("peak_memory_gib",),
        about="Of the main process: allocated on its GPU, or resident on a CPU.",
    ),
)


def curves(run: RunRecord) -> dict[str, dict[str, Points]]:
    """{metric: {training: points, held_out: points}} for every metric in `CHARTS` that the run has."""
    found: dict[str, dict[str, Points]] = {}
    for metric in (name for chart in CHARTS for name in chart.metrics):
        parts = {"training": run.values(metric), "held_out": run.values(metric, held_out=True)}
        kept = {name: thin(*points) for name, points in parts.items() if points[0]}
        if kept:
            found[metric] = kept
    return found


def thin(steps: Sequence[int], values: Sequence[float], most: int = MOST_POINTS) -> Points:
    """At most `most` points that give the same plot: minimum and maximum of each interval, so that no spike is lost."""
    if len(steps) <= most:
        return list(steps), [_short(value) for value in values]
    kept, first = {0, len(steps) - 1}, 0
    for stretch in np.array_split(np.asarray(values), most // 2 - 1):
        kept |= {first + int(stretch.argmin()), first + int(stretch.argmax())}
        first += len(stretch)
    order = sorted(kept)
    return [steps[place] for place in order], [_short(values[place]) for place in order]


def _short(value: float) -> float:
    return float(f"{value:.5g}")
